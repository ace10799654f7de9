// lowbit_linear on a GPU. 16-bit and int8 activations go through tensor cores (cuda_mma.h); float32
// ones are summed in float32 by linear's own kernels, on weights made float32 as they are read, so
// that those results are linear's on the dequantized weight, bit for bit.
#include "base/gpu.h"
#include "ops/linear/cuda_float.h"
#include "ops/lowbit_linear/cuda_few_rows.h"
#include "ops/lowbit_linear/cuda_many_rows.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

// Weights as float32: scale * (value - zero) + offset, rounded after each.
template <LowbitFormat F>
struct DequantizedWeights {
  LowbitWeight w;

  // f(i, weight) for `count` weights of output `lane` of a panel, from k = `first` on, which is a
  // multiple of four.
  template <class Use>
  __device__ void each(int64_t panel, int64_t first, int count, int lane, Use&& f) const {
    constexpr lowbit::Layout l = lowbit::layout(F);
    const uint8_t* const units = w.packed + panel * w.panel_stride;
    int64_t group = first / w.group - 1, group_end = 0;
    float scale = 0.f, offset = 0.f;
    int zero = 0;
    for (int i = 0; i < count; i += 4) {
      const int64_t k = first + i;
      if (i == 0 || k >= group_end) {
        group_end = (++group + 1) * w.group;
        scale = scale_at(w, panel, group, lane);
        if (w.offset != nullptr) offset = offset_at(w, panel, group, lane);
        zero = zero_at(w, panel, group, lane);
      }
      const uint32_t quad =
          quads<F, 1>(units + k / l.unit_k * l.unit_bytes, lane, static_cast<int>(k % l.unit_k) / 4)
              .v[0];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int value = static_cast<int>(quad >> 8 * j & 0xff) - zero;
        float weight = gpu::mul(scale, static_cast<float>(value));
        if (w.offset != nullptr) weight += offset;
        if (i + j < count) f(i + j, weight);
      }
    }
  }
};

// Calls f(F) with the format whose units these are: ternary codes lie as int2's.
template <class Use>
int with_format(LowbitFormat format, Use&& f) {
  using enum LowbitFormat;
  switch (format) {
    case int8:
      return f(std::integral_constant<LowbitFormat, int8>());
    case int4:
      return f(std::integral_constant<LowbitFormat, int4>());
    case int3:
      return f(std::integral_constant<LowbitFormat, int3>());
    case int2:
    case ternary:
      return f(std::integral_constant<LowbitFormat, int2>());
    case ternary_dense:
      return f(std::integral_constant<LowbitFormat, ternary_dense>());
    case binary:
      return f(std::integral_constant<LowbitFormat, binary>());
  }
  return gpu::kInvalidValue;
}

template <class A, LowbitFormat F>
int run(const lowbit::Problem& p, void* stream) {
  constexpr int kMostFewRows = 16;
  return p.args.io.rows <= kMostFewRows ? lowbit::launch_few_rows<A, F>(p, stream)
                                        : lowbit::launch_many_rows<A, F>(p, stream);
}

int run_mma(const LowbitLinear& args, void* stream) {
  lowbit::Problem p = lowbit::cut(args);
  lowbit::place(p, args.io.scratch);
  const Linear& io = args.io;
  p.aligned = is_aligned(io.x, 16) && io.x_stride % 8 == 0 && io.k % 8 == 0;
  if (lowbit::takes_sums(args)) {
    const int status =
        gpu::launch(&lowbit::prepare, dim3(static_cast<unsigned>(io.rows)), lowbit::kPrepareThreads,
                    lowbit::kPrepareWarps * sizeof(uint32_t), stream, p);
    if (status != 0) return status;
  }
  return with_format(args.weight.format, [&](auto format) {
    constexpr LowbitFormat kFormat = decltype(format)::value;
    if (args.int8_activations) return run<lowbit::Bytes, kFormat>(p, stream);
    return io.x_type == DType::bf16 ? run<lowbit::Floats<bf16>, kFormat>(p, stream)
                                    : run<lowbit::Floats<f16>, kFormat>(p, stream);
  });
}

// So many k that offsets inside a row fit an int, and so many rows that one launch takes them.
bool too_large(const Linear& io) {
  constexpr int64_t kMostK = int64_t{1} << 30;
  return io.k > kMostK || io.rows > gpu::kMaxGridYZ * lowbit::kManyRows;
}

}  // namespace

int64_t lowbit_linear_cuda_scratch(const LowbitLinear& args) {
  if (args.io.rows <= 0 || args.io.n <= 0 || too_large(args.io)) return 0;
  lowbit::Problem p = lowbit::cut(args);
  return lowbit::place(p, nullptr);
}

int lowbit_linear_cuda(const LowbitLinear& args, void* stream) {
  if (args.io.rows <= 0 || args.io.n <= 0) return 0;
  if (too_large(args.io) || !is_aligned(args.weight.packed, 16)) return gpu::kInvalidValue;
  if (args.int8_activations || args.io.x_type != DType::f32) return run_mma(args, stream);
  return with_format(args.weight.format, [&](auto format) {
    const DequantizedWeights<decltype(format)::value> weights = {args.weight};
    return linear_float(args.io, weights, stream);
  });
}

}  // namespace effinfer
