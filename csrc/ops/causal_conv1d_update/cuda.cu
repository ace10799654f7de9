// causal_conv1d_update on a GPU: one thread per row and channel.
#include "base/gpu.h"
#include "ops/causal_conv1d_update/causal_conv1d_update.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) update(CausalConv1dUpdate a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.batch * a.dim) return;
  const int64_t row = i / a.dim, d = i % a.dim;
  const int64_t slot = a.slots != nullptr ? a.slots[row] : row;
  const bool used = slot >= 0 && slot < a.pool;
  const int64_t state = slot * a.state_slot + d * a.state_dim;
  const auto input = [&](int64_t t) {
    return gpu::load_any(a.x, a.type, row * a.x_batch + d * a.x_dim + t * a.x_time);
  };
  // Column c of the state and the inputs after it, at the precision the state keeps.
  const auto column = [&](int64_t c) {
    return c < a.columns ? gpu::load_any(a.state, a.state_type, state + c * a.state_column)
                         : gpu::rounded(input(c - a.columns), a.state_type);
  };
  for (int64_t t = 0; t < a.length; ++t) {
    float y = 0.f;
    if (used) {
      const float* weight = a.weight + d * a.width;
      y = a.bias != nullptr ? a.bias[d] : 0.f;
      for (int64_t j = 0; j < a.width - 1; ++j)
        y = gpu::fma(weight[j], column(a.columns + t - (a.width - 1 - j) * a.dilation), y);
      y = gpu::fma(weight[a.width - 1], input(t), y);
      if (a.silu) y = gpu::silu(y);
    }
    gpu::store_any(a.y, a.type, row * a.y_batch + d * a.y_dim + t * a.y_time, y);
  }
  if (!used) return;
  for (int64_t c = 0; c < a.columns; ++c)  // upwards: what is read has not been written yet
    gpu::store_any(a.state, a.state_type, state + c * a.state_column, column(c + a.length));
}

}  // namespace

int causal_conv1d_update_cuda(const CausalConv1dUpdate& args, void* stream) {
  const int64_t blocks = (args.batch * args.dim + kThreads - 1) / kThreads;
  return gpu::launch(&update, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, args);
}

}  // namespace effinfer
