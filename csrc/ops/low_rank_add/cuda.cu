// low_rank_add on a GPU: one block per row, its low products in shared memory.
#include "base/gpu.h"
#include "ops/low_rank_add/low_rank_add.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;

template <class X, class W>
__global__ void __launch_bounds__(kThreads) add_row(LowRankAdd a) {
  constexpr int64_t kPanel = LowRankAdd::kPanel;
  const int64_t row = blockIdx.x, group = a.index[row];
  const auto* x = static_cast<const X*>(a.x) + row * a.x_stride;
  const auto* down = static_cast<const W*>(a.down) + group * a.rank * a.k;
  auto* low = gpu::shared<float>();
  for (int64_t r = threadIdx.x / gpu::kWarp; r < a.rank; r += kThreads / gpu::kWarp) {
    float sum = 0.f;
    for (int64_t i = gpu::lane(); i < a.k; i += gpu::kWarp)
      sum += gpu::load(x + i) * gpu::load(down + r * a.k + i);
    sum = gpu::warp_sum(sum);
    if (gpu::lane() == 0) low[r] = sum;
  }
  gpu::sync_block();
  const auto* up = static_cast<const W*>(a.up) + group * a.up_size;
  const float* bias = a.bias != nullptr ? a.bias + group * a.n : nullptr;
  auto* y = static_cast<X*>(a.y) + row * a.y_stride;
  for (int p = 0; p < a.part_count; ++p) {
    const LowRankAdd::Part part = a.parts[p];
    for (int64_t j = threadIdx.x; j < part.outputs; j += kThreads) {
      const auto* column = up + j / kPanel * kPanel * part.rank + j % kPanel;
      float sum = bias != nullptr ? bias[j] : 0.f;
      for (int64_t r = 0; r < part.rank; ++r) sum += low[r] * gpu::load(column + r * kPanel);
      gpu::store(y + j, gpu::load(y + j) + sum);
    }
    up += part.panels() * kPanel * part.rank;
    bias = bias != nullptr ? bias + part.outputs : nullptr;
    y += part.outputs;
    low += part.rank;
  }
}

}  // namespace

int low_rank_add_cuda(const LowRankAdd& args, void* stream) {
  int status = 0;
  with_type(args.x_type, [&](auto x) {
    with_type(args.weight_type, [&](auto weight) {
      status = gpu::launch(&add_row<decltype(x), decltype(weight)>,
                           dim3(static_cast<unsigned>(args.rows)), kThreads,
                           static_cast<size_t>(args.rank) * sizeof(float), stream, args);
    });
  });
  return status;
}

}  // namespace effinfer
