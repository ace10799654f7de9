// selective_scan_lmu on a GPU: a block is a row, whose memory and inputs stay in shared memory; a
// thread sums up every kThreads-th number of the next memory, in the scalar kernel's order.
#include "base/gpu.h"
#include "ops/selective_scan_lmu/selective_scan_lmu.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) scan_row(SelectiveScanLmu a) {
  const int64_t row = blockIdx.x, batch = row / a.dim, channel = row % a.dim, inner = a.inner();
  const int thread = static_cast<int>(threadIdx.x);
  float* m = gpu::shared<float>();  // the memory, then the step's inputs
  float* next = m + inner;
  const auto save = [&](float* to) {  // each thread what it has written itself
    for (int64_t n = thread; n < a.state; n += kThreads) to[n] = m[n];
  };
  const auto snapshot = [&](int64_t k) {
    save(a.snapshots + ((batch * a.num_snapshots + k) * a.dim + channel) * a.state);
  };
  for (int64_t n = thread; n < a.state; n += kThreads)
    m[n] = a.initial_state != nullptr ? a.initial_state[row * a.state + n] : 0.f;
  for (int64_t k = a.length; k < a.num_snapshots; ++k) snapshot(k);
  for (int64_t t = 0; t < a.length; t += a.chunk) {
    for (int64_t i = thread; i < a.chunk; i += kThreads)
      m[a.state + i] = gpu::load_any(
          a.u.data, a.u.type, batch * a.u.batch + channel * a.u.channel + (t + i) * a.u.time);
    gpu::sync_block();
    for (int64_t n = thread; n < a.state; n += kThreads) {
      const float* column = a.transition + n / kLmuPanel * inner * kLmuPanel + n % kLmuPanel;
      float sum = 0.f;
      for (int64_t j = 0; j < inner; ++j) sum = gpu::fma(column[j * kLmuPanel], m[j], sum);
      next[n] = sum;
      if (a.memories != nullptr)
        gpu::store_any(a.memories, a.u.type, (row * a.length + t) * a.state + n, sum);
    }
    // No second barrier: the next step writes where this one has only read before it.
    float* const before = m;
    m = next;
    next = before;
    if (const int64_t left = a.length - t - a.chunk; left < a.num_snapshots) snapshot(left);
  }
  save(a.last_state + row * a.state);
}

}  // namespace

int selective_scan_lmu_cuda(const SelectiveScanLmu& args, void* stream) {
  const int64_t rows = args.batch * args.dim, bytes = 2 * args.inner() * int64_t{sizeof(float)};
  if (rows > gpu::kMaxGridX || bytes > 96 * 1024) return gpu::kInvalidValue;
  return gpu::launch(&scan_row, dim3(static_cast<unsigned>(rows)), kThreads,
                     static_cast<size_t>(bytes), stream, args);
}

}  // namespace effinfer
