// linear on a GPU. x and weights of one 16-bit type go through tensor cores (cuda_mma.h); anything
// else is summed in float32 (cuda_float.h).
#include "base/gpu.h"
#include "ops/linear/cuda_float.h"
#include "ops/linear/cuda_mma.h"
#include "ops/linear/linear.h"

namespace effinfer {
namespace {

// Weights as pack_linear left them.
template <class W>
struct PackedWeights {
  const W* data;
  int64_t k;

  // f(i, weight) for `count` weights of output `lane` of a panel, from k = `first` on.
  template <class F>
  __device__ void each(int64_t panel, int64_t first, int count, int lane, F&& f) const {
    const W* w = data + (panel * k + first) * kPanel + place<W>(lane);
#pragma unroll 8
    for (int i = 0; i < count; ++i) f(i, gpu::load(w + i * kPanel));
  }
};

}  // namespace

int linear_cuda(const Linear& args, void* stream) {
  if (fits_tensor_cores(args)) return linear_mma(args, stream);
  int status = 0;
  with_type(args.weight_type, [&](auto w) {
    using W = decltype(w);
    const PackedWeights<W> weights = {static_cast<const W*>(args.weight), args.k};
    status = linear_float(args, weights, stream);
  });
  return status;
}

}  // namespace effinfer
