// ssd_state_update on a GPU: kLanes threads per row of a head's state, each with every kLanes-th
// element of it.
#include "base/gpu.h"
#include "ops/ssd/cuda_lanes.h"
#include "ops/ssd_state_update/ssd_state_update.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

template <int kLanes>
__global__ void __launch_bounds__(kThreads) step(SsdStateUpdate a, int64_t items) {
  constexpr int kItems = kThreads / kLanes;
  const int part = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t item = int64_t{blockIdx.x} * kItems + static_cast<int>(threadIdx.x) / kLanes;
  const bool real = item < items;  // the others only keep their warp whole
  const int64_t p = real ? item % a.head_dim : 0;
  const int64_t head = real ? item / a.head_dim % a.heads : 0;
  const int64_t row = real ? item / a.head_dim / a.heads : 0;
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const bool used = real && slot >= 0 && slot < a.slots;
  const auto signal = [&](const void* data, DType type, const int64_t* strides) {
    return gpu::load_any(data, type, row * strides[0] + head * strides[1] + p * strides[2]);
  };
  float y = 0.f, x = 0.f;
  if (used) {
    float delta = signal(a.dt, a.dt_type, a.dt_strides);
    if (a.dt_bias != nullptr)
      delta += a.dt_bias[head * a.dt_bias_strides[0] + p * a.dt_bias_strides[1]];
    if (a.dt_softplus) delta = gpu::softplus(delta);
    delta = delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;
    x = signal(a.x, a.x_type, a.x_strides);
    const int64_t group = head / (a.heads / a.groups);
    const int64_t B = row * a.B_strides[0] + group * a.B_strides[1];
    const int64_t C = row * a.C_strides[0] + group * a.C_strides[1];
    const float* A = a.A + head * a.A_strides[0] + p * a.A_strides[1];
    float* S =
        a.state + slot * a.state_strides[0] + head * a.state_strides[1] + p * a.state_strides[2];
    const float input = delta * x;
    for (int64_t n = part; n < a.state_dim; n += kLanes) {
      float& s = S[n * a.state_strides[3]];
      const float next = gpu::fma(expf(delta * A[n * a.A_strides[2]]), s,
                                  input * gpu::load_any(a.B, a.B_type, B + n * a.B_strides[2]));
      s = next;
      y = gpu::fma(gpu::load_any(a.C, a.B_type, C + n * a.C_strides[2]), next, y);
    }
  }
  y = gpu::lanes_sum<kLanes>(y);
  if (!real || part != 0) return;
  if (used && a.D != nullptr) y = gpu::fma(a.D[head * a.D_strides[0] + p * a.D_strides[1]], x, y);
  if (used && a.z != nullptr) y *= gpu::silu(signal(a.z, a.x_type, a.z_strides));
  gpu::store_any(a.y, a.x_type, row * a.y_strides[0] + head * a.y_strides[1] + p * a.y_strides[2],
                 y);
}

template <int kLanes>
int run(const SsdStateUpdate& a, void* stream) {
  constexpr int64_t kItems = kThreads / kLanes;
  const int64_t items = a.batch * a.heads * a.head_dim;
  const auto blocks = static_cast<unsigned>((items + kItems - 1) / kItems);
  return gpu::launch(&step<kLanes>, dim3(blocks), kThreads, 0, stream, a, items);
}

}  // namespace

int ssd_state_update_cuda(const SsdStateUpdate& args, void* stream) {
  if (args.state_dim <= kSsdFewStates) return run<kSsdFewLanes>(args, stream);
  if (args.state_dim <= kSsdManyStates) return run<kSsdLanes>(args, stream);
  return run<kSsdMostLanes>(args, stream);
}

}  // namespace effinfer
