#include "ops/lowbit_linear/lowbit_linear.h"

#include <cstring>
#include <string>

#include "base/parallel.h"
#include "python/tensor.h"

namespace effinfer::lowbit_linear_binding {

constexpr auto kOp = "lowbit_linear";
constexpr const char* kFormats[] = {"int8",    "int4",          "int3",  "int2",
                                    "ternary", "ternary_dense", "binary"};
constexpr const char* kEpilogues[] = {"none", "silu", "gelu", "gelu_tanh", "silu_mul", "gelu_mul"};
constexpr int64_t kMaxGroup = 65536;  // int32 sums hold 255 * 127 times as many, and no more

template <class Enum, size_t N>
Enum named(const char* arg, const char* const (&names)[N], const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<Enum>(i);
  reject(kOp, arg, "be a known one", "'" + name + "'");  // the Python layer lists them
}

// Panels may lie further apart than they are long: a prefix of units is no copy.
void want_dense_panels(const char* arg, const Tensor& t) {
  const bool dense = t.stride[2] == 1 && (t.stride[1] == t.shape[2] || t.shape[1] <= 1);
  if (t.numel() > 0 && !dense) reject(kOp, arg, "have contiguous panels", "a strided view");
}

// scale, zero or offset.
Tensor want_per_group(const char* arg, py::handle object, uint32_t types, int64_t panels,
                      int64_t groups, bool optional) {
  using linear_layout::kPanel;
  const Tensor t = optional ? want_optional(kOp, arg, object, types, {panels, groups, kPanel})
                            : want(kOp, arg, object, types, {panels, groups, kPanel});
  if (t) want_dense_panels(arg, t);
  return t;
}

LowbitWeight want_weight(py::handle packed_, py::handle scale_, py::handle zero_,
                         py::handle offset_, LowbitFormat format, int64_t panels, int64_t k,
                         int64_t group) {
  const lowbit::Layout layout = lowbit::layout(format);
  const int64_t step = lowbit::group_step(format);
  const bool whole = group >= k && group > 0;
  if (!whole && (group <= 0 || format == LowbitFormat::ternary_dense || group % step != 0))
    reject(kOp, "group_size",
           (format == LowbitFormat::ternary_dense
                ? std::string("be")
                : "be a multiple of " + std::to_string(step) + " or") +
               " at least in_features",
           std::to_string(group));
  if (group > kMaxGroup && k > kMaxGroup)
    reject(kOp, "group_size", "be at most 65536", std::to_string(group));
  LowbitWeight w = {};
  w.format = format;
  w.group = whole ? (k > 0 ? k : 1) : group;
  const int64_t units = (k + layout.unit_k - 1) / layout.unit_k;
  const int64_t groups = (k + w.group - 1) / w.group;
  const Tensor packed =
      want(kOp, "packed", packed_, kU8, {panels, units, int64_t{layout.unit_bytes}});
  want_dense_panels("packed", packed);
  const Tensor scale = want_per_group("scale", scale_, kFloats, panels, groups, false);
  const Tensor zero = want_per_group("zero", zero_, kU8, panels, groups, true);
  const Tensor offset = want_per_group("offset", offset_, scale.type, panels, groups, true);
  for (const Tensor* t : {&zero, &offset})
    if (*t && panels > 1 && t->stride[0] != scale.stride[0])
      reject(kOp, "zero and offset", "be strided as scale is", "other strides");
  if (zero && layout.step != 1) reject(kOp, "zero", "be None for binary", "a tensor");
  w.packed = packed.as<const uint8_t>();
  w.scale = scale.data;
  w.zero = zero.as<const uint8_t>();
  w.offset = offset.data;
  w.panel_stride = packed.stride[0];
  w.scale_stride = scale.stride[0];
  w.scale_type = scale.dtype();
  return w;
}

// -128 is no code: kernels take a code's sign away.
void want_codes(const Rows& x) {
#if !defined(EFFINFER_CUDA_MODULE) || defined(EFFINFER_CUDA_SHIM)
  for (int64_t r = 0; r < x.rows && x.dim > 0; ++r)
    if (std::memchr(x.tensor.as<const int8_t>() + r * x.stride, 0x80, static_cast<size_t>(x.dim)) !=
        nullptr)
      reject(kOp, "x", "hold codes of -127 to 127", "-128");
#else
  (void)x;  // not readable here
#endif
}

// What only layers of integers have: codes in, codes out.
void want_integers(LowbitLinear& args, const Rows& x, const Rows& y, py::handle x_scale_,
                   py::handle multiplier_, int64_t low, int64_t high) {
  const bool codes_in = x.tensor.type == kI8, codes_out = y.tensor.type == kI8;
  if (codes_in != !x_scale_.is_none())
    reject(kOp, "x_scale", "be given with an int8 x, and only with it",
           codes_in ? "None" : "a tensor");
  if (codes_in) {
    if (!args.int8_activations) reject(kOp, "activations", "be int8 with an int8 x", "f32");
    want_codes(x);
    args.x_scale = want_dense(kOp, "x_scale", x_scale_, kF32, {x.rows}).as<const float>();
  }
  if (codes_out) {
    if (!args.int8_activations) reject(kOp, "activations", "be int8 with requantize", "f32");
    args.multiplier =
        want_dense(kOp, "multiplier", multiplier_, kF32, {args.io.n}).as<const float>();
    if (low < -128 || high > 127 || low > high)
      reject(kOp, "requantize", "have -128 <= low <= high <= 127",
             std::to_string(low) + " and " + std::to_string(high));
    args.low = static_cast<float>(low);
    args.high = static_cast<float>(high);
  }
}

void run(py::handle x_, py::handle packed_, py::handle scale_, py::handle zero_, py::handle offset_,
         py::handle bias_, py::handle residual_, py::handle x_scale_, py::handle multiplier_,
         const std::string& format, int64_t out_features, int64_t in_features, int64_t group_size,
         bool int8_activations, const std::string& epilogue, int64_t low, int64_t high,
         py::handle y_) {
  LowbitLinear args = {};
  Linear& io = args.io;
  io.n = out_features;
  io.k = in_features;
  io.epilogue = named<Epilogue>("epilogue", kEpilogues, epilogue);
  args.int8_activations = int8_activations;
  if (io.n < 0) reject(kOp, "out_features", "be 0 or more", std::to_string(io.n));
  if (io.k < 0) reject(kOp, "in_features", "be 0 or more", std::to_string(io.k));
  const Rows x = want_rows(kOp, "x", x_, kFloats | kI8, kAny, io.k);
  args.weight =
      want_weight(packed_, scale_, zero_, offset_, named<LowbitFormat>("format", kFormats, format),
                  linear_layout::panels(io), io.k, group_size);
  const Tensor bias = takes_two(io.epilogue) ? want_dense(kOp, "bias", bias_, kF32, {2, io.n})
                                             : want_dense(kOp, "bias", bias_, kF32, {io.n});
  const uint32_t wide = x.tensor.type == kI8 ? kF32 : x.tensor.type;
  const Rows residual = want_rows(kOp, "residual", residual_, wide, x.rows, io.n, true);
  const Rows y = want_rows(kOp, "y", y_, multiplier_.is_none() ? wide : kI8, x.rows, io.n);
  io.x = x.tensor.data;
  io.bias = bias.as<const float>();
  io.residual = residual.tensor.data;
  io.y = y.tensor.data;
  io.rows = x.rows;
  io.x_stride = x.stride;
  io.residual_stride = residual.stride;
  io.y_stride = y.stride;
  io.x_type = x.tensor.dtype();
  want_integers(args, x, y, x_scale_, multiplier_, low, high);
#if defined(EFFINFER_CUDA_MODULE)
  const DeviceScratch scratch(x_, lowbit_linear_cuda_scratch(args));
  io.scratch = scratch.data();
#else
  io.slots = num_threads();
  io.scratch = static_cast<float*>(workspace(lowbit_linear_scratch(args)));
#endif
  RUN(lowbit_linear, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("lowbit_linear"); }

}  // namespace effinfer::lowbit_linear_binding
