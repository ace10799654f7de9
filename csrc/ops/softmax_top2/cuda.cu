// softmax_top2 on a GPU: one block per row, a tree for the two largest and a sum.
#include "base/gpu.h"
#include "ops/softmax_top2/softmax_top2.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) two_of_row(SoftmaxTop2 a) {
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const auto* x = static_cast<const T*>(a.x) + row * a.x_stride;
  float* const firsts = gpu::shared<float>();
  float* const seconds = firsts + kThreads;
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = thread; i < a.dim; i += kThreads) {
    const float value = gpu::load(x + i);
    if (value > first) {
      second = first;
      first = value;
    } else if (value > second) {
      second = value;
    }
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    firsts[thread] = first;
    seconds[thread] = second;
    gpu::sync_block();
    if (thread < half) {
      const float other = firsts[thread + half];
      second = fmaxf(fminf(first, other), fmaxf(second, seconds[thread + half]));
      first = fmaxf(first, other);
    }
    gpu::sync_block();
  }
  if (thread == 0) {
    firsts[0] = first;
    seconds[0] = second;
  }
  gpu::sync_block();
  first = firsts[0];
  second = seconds[0];
  gpu::sync_block();  // the sum reuses the memory
  float total = 0.f;
  for (int64_t i = thread; i < a.dim; i += kThreads) total += expf(gpu::load(x + i) - first);
  total = gpu::block_sum(total, firsts);
  if (thread == 0) {
    a.y[2 * row] = 1.f / total;
    a.y[2 * row + 1] = expf(second - first) / total;
  }
}

}  // namespace

int softmax_top2_cuda(const SoftmaxTop2& args, void* stream) {
  int status = 0;
  with_type(args.type, [&](auto type) {
    status = gpu::launch(&two_of_row<decltype(type)>, dim3(static_cast<unsigned>(args.rows)),
                         kThreads, 2 * kThreads * sizeof(float), stream, args);
  });
  return status;
}

}  // namespace effinfer
