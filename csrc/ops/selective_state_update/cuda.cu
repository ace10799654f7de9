// selective_state_update on a GPU: kLanes threads per row and channel, each with every kLanes-th
// state, so that a warp reads and writes neighbouring states.
#include "base/gpu.h"
#include "ops/selective_state_update/selective_state_update.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

__device__ float at(const StepSignal& s, int64_t row, int64_t channel) {
  return gpu::load_any(s.data, s.type, row * s.batch + channel * s.channel);
}

__device__ float at(const StepMatrix& m, int64_t row, int64_t group, int64_t n) {
  return gpu::load_any(m.data, m.type, row * m.batch + group * m.group + n * m.state);
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads) step(SelectiveStateUpdate a, int64_t items) {
  constexpr int kItems = kThreads / kLanes;
  const int part = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t item = int64_t{blockIdx.x} * kItems + static_cast<int>(threadIdx.x) / kLanes;
  const bool real = item < items;  // the others only keep their warp whole
  const int64_t row = real ? item / a.dim : 0, d = real ? item % a.dim : 0;
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const bool used = real && slot >= 0 && slot < a.slots;
  float y = 0.f;
  if (used) {
    const int64_t group = d / (a.dim / a.groups);
    float delta = at(a.dt, row, d) + (a.dt_bias != nullptr ? a.dt_bias[d] : 0.f);
    if (a.softplus) delta = gpu::softplus(delta);
    const float x = at(a.x, row, d), input = delta * x;
    if (part == 0 && a.D != nullptr) y = a.D[d] * x;
    for (int64_t n = part; n < a.state_size; n += kLanes) {
      float* h = a.state + slot * a.state_slot + d * a.state_channel + n * a.state_n;
      const float next =
          gpu::fma(expf(delta * a.A[d * a.state_size + n]), *h, input * at(a.B, row, group, n));
      *h = next;
      y = gpu::fma(at(a.C, row, group, n), next, y);
    }
  }
  y = gpu::lanes_sum<kLanes>(y);
  if (!real || part != 0) return;
  if (used && a.z.data != nullptr) y *= gpu::silu(at(a.z, row, d));
  gpu::store_any(a.y.data, a.y.type, row * a.y.batch + d * a.y.channel, y);
}

template <int kLanes>
int run(const SelectiveStateUpdate& a, void* stream) {
  constexpr int64_t kItems = kThreads / kLanes;
  const int64_t items = a.batch * a.dim;
  const auto blocks = static_cast<unsigned>((items + kItems - 1) / kItems);
  return gpu::launch(&step<kLanes>, dim3(blocks), kThreads, 0, stream, a, items);
}

}  // namespace

int selective_state_update_cuda(const SelectiveStateUpdate& args, void* stream) {
  return args.state_size <= 16 ? run<4>(args, stream) : run<16>(args, stream);
}

}  // namespace effinfer
