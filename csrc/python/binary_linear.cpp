#include "ops/binary_linear/binary_linear.h"

#include <string>

#include "base/parallel.h"
#include "python/epilogue.h"
#include "python/tensor.h"

namespace effinfer::binary_linear_binding {

constexpr auto kOp = "binary_linear";
constexpr int64_t kMostTerms = 1 << 24;  // of a dot product that float32 holds exactly

void run(py::handle x_, py::handle packed_, int64_t in_features, int64_t out_features,
         py::handle weight_scale_, py::handle bias_, py::handle x_scale_, bool mean_scale,
         const std::string& epilogue, py::handle residual_, py::handle y_) {
  using namespace binary_layout;
  BinaryLinear args = {};
  args.n = out_features;
  args.k = in_features;
  if (args.n < 0) reject(kOp, "out_features", "be 0 or more", std::to_string(args.n));
  if (args.k < 0 || args.k > kMostTerms)
    reject(kOp, "in_features", "be in [0, 2^24]", std::to_string(args.k));
  args.epilogue = epilogue_named(kOp, epilogue);
  if (takes_two(args.epilogue))
    reject(kOp, "epilogue", "be one for a single matrix", "'" + epilogue + "'");
  Rows x = want_rows(kOp, "x", x_, kFloats | kU8);
  args.x_is_bits = x.tensor.type == kU8;
  x = want_rows(kOp, "x", x_, kFloats | kU8, kAny, args.x_is_bits ? bytes_of(args.k) : args.k);
  const Tensor packed =
      want(kOp, "packed", packed_, kU8, {panels_of(args.n), bytes_of(args.k), kOutputs});
  if (packed.numel() > 0 && (packed.stride[2] != 1 || packed.stride[1] != kOutputs))
    reject(kOp, "packed", "have contiguous panels", "a strided view");
  const Tensor weight_scale = want_dense(kOp, "weight_scale", weight_scale_, kF32, {args.n});
  const Tensor bias = want_dense(kOp, "bias", bias_, kF32, {args.n});
  const Tensor x_scale = want_dense(kOp, "x_scale", x_scale_, kF32, {x.rows});
  if (mean_scale && (args.x_is_bits || x_scale))
    reject(kOp, "x_scale", "not be 'mean'", args.x_is_bits ? "packed signs" : "another scale");
  const uint32_t y_type = args.x_is_bits ? uint32_t{kF32} : x.tensor.type;
  const Rows residual = want_rows(kOp, "residual", residual_, y_type, x.rows, args.n, true);
  const Rows y = want_rows(kOp, "y", y_, y_type, x.rows, args.n);
  args.x = x.tensor.data;
  args.weight = packed.as<const uint8_t>();
  args.weight_scale = weight_scale.as<const float>();
  args.bias = bias.as<const float>();
  args.x_scale = x_scale.as<const float>();
  args.residual = residual.tensor.data;
  args.y = y.tensor.data;
  args.rows = x.rows;
  args.panel_stride = packed.stride[0];
  args.x_stride = x.stride;
  args.residual_stride = residual.stride;
  args.y_stride = y.stride;
  args.x_type = x.tensor.dtype();
  args.y_type = y.tensor.dtype();
  args.mean_scale = mean_scale;
#if defined(EFFINFER_CUDA_MODULE)
  const DeviceScratch scratch(x_, binary_linear_cuda_scratch(args));
  args.scratch = scratch.data();
#else
  args.slots = num_threads();
  args.scratch = workspace(binary_linear_scratch(args));
#endif
  RUN(binary_linear, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("binary_linear"); }

}  // namespace effinfer::binary_linear_binding
