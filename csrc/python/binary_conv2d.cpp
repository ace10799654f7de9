#include "ops/binary_conv2d/binary_conv2d.h"

#include <algorithm>
#include <bit>
#include <string>

#include "base/parallel.h"
#include "python/epilogue.h"
#include "python/tensor.h"

namespace effinfer::binary_conv2d_binding {

using namespace binary_layout;

constexpr int64_t kMostTerms = 1 << 24;  // of a dot product that float32 holds exactly

constexpr int64_t kMostPixels = 1 << 24;  // of kernels, padding, strides and dilation

// Pairs (vertical, horizontal), each at least `least`.
void take_pair(const char* op, const char* arg, const py::tuple& pair, int64_t least,
               int64_t (&out)[2]) {
  for (size_t i = 0; i < 2; ++i) {
    out[i] = pair[i].cast<int64_t>();
    if (out[i] < least || out[i] > kMostPixels)
      reject(op, arg, "be at least " + std::to_string(least) + " and at most 2^24",
             std::to_string(out[i]));
  }
}

// How many places a kernel has along one dimension.
int64_t places(const BinaryConv2d& a, int64_t size, int i) {
  const int64_t room = size + 2 * a.padding[i] - a.dilation[i] * (a.kernel[i] - 1) - 1;
  return room < 0 ? 0 : room / a.stride[i] + 1;
}

// What both epilogues share; `types` are those that x may have.
BinaryConv2d arguments(const char* op, uint32_t types, const Tensor& x, py::handle packed_,
                       int64_t in_channels, int64_t out_channels, const py::tuple& kernel,
                       const py::tuple& stride, const py::tuple& padding, const py::tuple& dilation,
                       bool pad_ones, py::handle threshold_) {
  BinaryConv2d args = {};
  args.n = out_channels;
  args.channels = in_channels;
  if (args.n < 0) reject(op, "out_channels", "be 0 or more", std::to_string(args.n));
  if (args.channels < 1) reject(op, "in_channels", "be 1 or more", std::to_string(args.channels));
  args.x_is_bits = x.type == kU8;
  args.x_is_integer = x.type == kI32;
  const int64_t last = args.x_is_bits ? bytes_of(args.channels) : args.channels;
  if (x.shape[3] != last)
    reject(op, "x", "have " + std::to_string(last) + (args.x_is_bits ? " bytes" : " channels"),
           std::to_string(x.shape[3]));
  take_pair(op, "kernel_size", kernel, 1, args.kernel);
  const int64_t taps = args.kernel[0] * args.kernel[1];
  if (args.channels > kMostTerms || taps > kMostTerms || taps * args.channels > kMostTerms)
    reject(op, "in_channels", "be at most 2^24 over all taps", std::to_string(args.channels));
  const Tensor packed = want(op, "packed", packed_, kU8,
                             {panels_of(args.n), taps * bytes_of(args.channels), kOutputs});
  if (packed.numel() > 0 && (packed.stride[2] != 1 || packed.stride[1] != kOutputs))
    reject(op, "packed", "have contiguous panels", "a strided view");
  take_pair(op, "stride", stride, 1, args.stride);
  take_pair(op, "padding", padding, 0, args.padding);
  take_pair(op, "dilation", dilation, 1, args.dilation);
  const Tensor threshold = want_dense(op, "threshold", threshold_,
                                      types & kI32 ? uint32_t{kI32} : kF32, {args.channels});
  if (threshold && args.x_is_bits) reject(op, "threshold", "be None", "one for packed signs");
  args.x = x.data;
  args.threshold = threshold.data;
  args.weight = packed.as<const uint8_t>();
  args.pad_ones = pad_ones;
  args.batch = x.shape[0];
  args.height = x.shape[1];
  args.width = x.shape[2];
  args.out_height = places(args, args.height, 0);
  args.out_width = places(args, args.width, 1);
  args.panel_stride = packed.stride[0];
  args.x_type = x.dtype();
  return args;
}

void take_outputs(const char* op, BinaryConv2d& args, uint32_t type, py::handle residual_,
                  py::handle y_) {
  const auto images = {args.batch, args.out_height, args.out_width, args.n};
  args.residual = want_dense(op, "residual", residual_, type, images).data;
  const Tensor y = want_dense(op, "y", y_, type, images);
  args.y = y.data;
  args.y_type = y.dtype();
}

void run_with_scratch(BinaryConv2d& args, [[maybe_unused]] const Tensor& x,
                      [[maybe_unused]] py::handle like) {
#if defined(EFFINFER_CUDA_MODULE)
  const DeviceScratch scratch(like, binary_conv2d_cuda_scratch(args));
  args.scratch = scratch.data();
#else
  args.slots = num_threads();
  args.scratch = workspace(binary_conv2d_scratch(args));
#endif
  RUN(binary_conv2d, args, x);
}

void run(py::handle x_, py::handle packed_, int64_t in_channels, int64_t out_channels,
         const py::tuple& kernel, py::handle weight_scale_, py::handle bias_, py::handle threshold_,
         const py::tuple& stride, const py::tuple& padding, const py::tuple& dilation,
         bool pad_ones, const std::string& epilogue, py::handle residual_, py::handle y_) {
  constexpr auto kOp = "binary_conv2d";
  const Tensor x = want_dense(kOp, "x", x_, kFloats | kU8, {kAny, kAny, kAny, kAny});
  BinaryConv2d args = arguments(kOp, kFloats, x, packed_, in_channels, out_channels, kernel, stride,
                                padding, dilation, pad_ones, threshold_);
  args.weight_scale =
      want_dense(kOp, "weight_scale", weight_scale_, kF32, {args.n}).as<const float>();
  args.bias = want_dense(kOp, "bias", bias_, kF32, {args.n}).as<const float>();
  args.epilogue = epilogue_named(kOp, epilogue);
  if (takes_two(args.epilogue))
    reject(kOp, "epilogue", "be one for a single matrix", "'" + epilogue + "'");
  take_outputs(kOp, args, args.x_is_bits ? uint32_t{kF32} : x.type, residual_, y_);
  run_with_scratch(args, x, x_);
}

void run_fixed(py::handle x_, py::handle threshold_, py::handle packed_, int64_t in_channels,
               int64_t out_channels, const py::tuple& kernel, py::handle gain_shift_,
               py::handle pre_bias_, py::handle slope_shift_, py::handle post_bias_,
               const py::tuple& stride, const py::tuple& padding, const py::tuple& dilation,
               bool pad_ones, py::handle residual_, py::handle y_) {
  constexpr auto kOp = "binary_conv2d_fixed";
  const Tensor x = want_dense(kOp, "x", x_, kI32, {kAny, kAny, kAny, kAny});
  BinaryConv2d args = arguments(kOp, kI32, x, packed_, in_channels, out_channels, kernel, stride,
                                padding, dilation, pad_ones, threshold_);
  if (args.threshold == nullptr) reject(kOp, "threshold", "be given", "None");
  const int64_t terms = std::max<int64_t>(args.channels * args.kernel[0] * args.kernel[1], 1);
  const int32_t most_gain = std::bit_width(static_cast<uint64_t>(kFixedLimit / terms)) - 1;
  const auto per_output = [&](const char* arg, py::handle object, [[maybe_unused]] int32_t least,
                              [[maybe_unused]] int32_t most) {
    const Tensor t = want(kOp, arg, object, kI32, {args.n});
    if (!t.is_contiguous()) reject(kOp, arg, "be contiguous", "a strided view");
    const auto* const values = t.as<const int32_t>();
#if !defined(EFFINFER_CUDA_MODULE)  // reading a GPU's numbers here would wait for it
    for (int64_t n = 0; n < args.n; ++n)
      if (values[n] < least || values[n] > most)
        reject(kOp, arg, "be within " + std::to_string(least) + " and " + std::to_string(most),
               std::to_string(values[n]));
#endif
    return values;
  };
  args.fixed = true;
  args.fixed_epilogue = {per_output("gain_shift", gain_shift_, 0, most_gain),
                         per_output("pre_bias", pre_bias_, -kMostBias, kMostBias),
                         per_output("slope_shift", slope_shift_, 0, 31),
                         per_output("post_bias", post_bias_, -kMostBias, kMostBias)};
  take_outputs(kOp, args, kI32, residual_, y_);
  run_with_scratch(args, x, x_);
}

void bind(Module& m) {
  m.def<&run>("binary_conv2d");
  m.def<&run_fixed>("binary_conv2d_fixed");
}

}  // namespace effinfer::binary_conv2d_binding
