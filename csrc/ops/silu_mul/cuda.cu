// silu_mul on a GPU: one block per row.
#include "base/gpu.h"
#include "ops/silu_mul/silu_mul.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) multiply_row(SiluMul a) {
  const int64_t row = blockIdx.x;
  const auto* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const auto* up = static_cast<const T*>(a.up) + row * a.up_stride;
  auto* y = static_cast<T*>(a.y) + row * a.y_stride;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads)
    gpu::store(y + i, gpu::silu(gpu::load(gate + i)) * gpu::load(up + i));
}

}  // namespace

int silu_mul_cuda(const SiluMul& args, void* stream) {
  int status = 0;
  with_type(args.type, [&](auto type) {
    status = gpu::launch(&multiply_row<decltype(type)>, dim3(static_cast<unsigned>(args.rows)),
                         kThreads, 0, stream, args);
  });
  return status;
}

}  // namespace effinfer
