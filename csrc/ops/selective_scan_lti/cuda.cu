// selective_scan_lti on a GPU: the recurrence as it is written, one token after the other, so that
// every way of cutting, masking or packing a sequence gives the same bits. A block is a few
// channels of one sequence; each channel's states and coefficients are spread over kLanes threads
// and stay in registers. A tile of positions at a time goes through shared memory.
#include "base/gpu.h"
#include "ops/selective_scan_lti/selective_scan_lti.h"

namespace effinfer {
namespace {

constexpr int kThreads = 64;
constexpr int kTile = 32;  // positions

struct Complex {
  float re, im;
};

__device__ float advance(float a, float h, float b, float u) { return gpu::fma(a, h, b * u); }
__device__ Complex advance(Complex a, Complex h, Complex b, float u) {
  return {gpu::fma(a.re, h.re, gpu::fma(-a.im, h.im, b.re * u)),
          gpu::fma(a.re, h.im, gpu::fma(a.im, h.re, b.im * u))};
}

// y + Re(c h)
__device__ float project(float c, float h, float y) { return gpu::fma(c, h, y); }
__device__ float project(Complex c, Complex h, float y) {
  return gpu::fma(-c.im, h.im, gpu::fma(c.re, h.re, y));
}

// Shared memory of a block.
template <int kChannels>
struct Shared {
  float u[kTile][kChannels], y[kTile][kChannels];
  float valid[kTile];
  float scratch[kThreads / gpu::kWarp];
};

// T is float or Complex.
template <class T, int kLanes, int kStates>
__global__ void __launch_bounds__(kThreads) scan(SelectiveScanLti a, int64_t blocks_per_sequence) {
  constexpr int kChannels = kThreads / kLanes;
  auto& s = *gpu::shared<Shared<kChannels>>();
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanes;
  const int mine = thread / kLanes;  // this thread's channel in the block
  const int64_t sequence = blockIdx.x / blocks_per_sequence;
  const int64_t first = blockIdx.x % blocks_per_sequence * kChannels, rest = a.dim - first;
  const int channels = static_cast<int>(rest < kChannels ? rest : kChannels);
  const int64_t channel = first + (mine < channels ? mine : 0);  // idle threads copy the first

  const bool packed = a.cu_seqlens != nullptr;
  const int64_t batch = packed ? 0 : sequence;
  int64_t begin = packed ? a.cu_seqlens[sequence] : 0;
  int64_t end = packed ? a.cu_seqlens[sequence + 1] : a.length;
  begin = begin < 0 ? 0 : begin;
  end = end > a.length ? a.length : end;  // what lies on the GPU was not checked on the host
  const auto valid = [&](int64_t t) {
    return a.mask == nullptr || a.mask[batch * a.mask_batch + t * a.mask_time] != 0;
  };

  T h[kStates], A[kStates], B[kStates], C[kStates];
  const int64_t row = (sequence * a.dim + channel) * a.state;
  const auto value = [](const float* from, int64_t i) {
    return reinterpret_cast<const T*>(from)[i];
  };
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const int64_t n = part + i * kLanes;
    const bool in = n < a.state;
    A[i] = in ? value(a.A, channel * a.state + n) : T{};
    B[i] = in ? value(a.B, channel * a.state + n) : T{};
    C[i] = in ? value(a.C, channel * a.state + n) : T{};
    h[i] = in && a.initial_state != nullptr ? value(a.initial_state, row + n) : T{};
  }
  const auto save = [&](float* to, int64_t at) {
    if (mine >= channels) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (const int64_t n = part + i * kLanes; n < a.state) reinterpret_cast<T*>(to)[at + n] = h[i];
  };
  const auto snapshot = [&](int64_t k) {
    if (k < a.num_snapshots)
      save(a.snapshots, ((sequence * a.num_snapshots + k) * a.dim + channel) * a.state);
  };
  int64_t left = end > begin ? end - begin : 0;  // tokens not walked yet
  if (a.num_snapshots > 0) {
    if (a.mask != nullptr) {
      float count = 0.f;
      for (int64_t t = begin + thread; t < end; t += kThreads) count += valid(t) ? 1.f : 0.f;
      left = static_cast<int64_t>(gpu::block_sum(count, s.scratch));
    }
    for (int64_t k = a.num_snapshots - 1; k >= left; --k) snapshot(k);
  }

  const float D = a.D != nullptr ? a.D[channel] : 0.f;
  for (int64_t start = begin; start < end; start += kTile) {
    const int tile = static_cast<int>(end - start < kTile ? end - start : kTile);
    const auto position = [&](int i) {
      return a.reverse ? end - 1 - (start - begin) - i : start + i;
    };
    gpu::sync_block();  // the last tile's results have been read
    for (int i = thread; i < tile; i += kThreads) s.valid[i] = valid(position(i)) ? 1.f : 0.f;
    for (int i = thread; i < tile * channels; i += kThreads) {
      // Neighbouring threads take neighbouring memory, whichever way the signal lies.
      const int t = a.u.channel == 1 ? i / channels : i % tile;
      const int c = a.u.channel == 1 ? i % channels : i / tile;
      s.u[t][c] =
          gpu::load_any(a.u.data, a.u.type,
                        batch * a.u.batch + (first + c) * a.u.channel + position(t) * a.u.time);
    }
    gpu::sync_block();
    for (int t = 0; t < tile; ++t) {
      if (s.valid[t] == 0.f) {
        if (part == 0) s.y[t][mine] = 0.f;
        continue;
      }
      const float u = s.u[t][mine < channels ? mine : 0];
      float y = part == 0 && a.D != nullptr ? D * u : 0.f;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        if (part + i * kLanes >= a.state) break;
        h[i] = advance(A[i], h[i], B[i], u);
        y = project(C[i], h[i], y);
      }
      y = gpu::lanes_sum<kLanes>(y);
      if (part == 0) s.y[t][mine] = y;
      snapshot(--left);
    }
    gpu::sync_block();
    for (int i = thread; i < tile * channels; i += kThreads) {
      const int t = a.y.channel == 1 ? i / channels : i % tile;
      const int c = a.y.channel == 1 ? i % channels : i / tile;
      gpu::store_any(a.y.data, a.y.type,
                     batch * a.y.batch + (first + c) * a.y.channel + position(t) * a.y.time,
                     s.y[t][c]);
    }
  }
  save(a.last_state, row);
}

template <class T, int kLanes, int kStates>
int run(const SelectiveScanLti& a, void* stream) {
  constexpr int kChannels = kThreads / kLanes;
  const int64_t blocks_per_sequence = (a.dim + kChannels - 1) / kChannels;
  const auto blocks = static_cast<unsigned>(a.sequences * blocks_per_sequence);
  return gpu::launch(&scan<T, kLanes, kStates>, dim3(blocks), kThreads, sizeof(Shared<kChannels>),
                     stream, a, blocks_per_sequence);
}

template <class T>
int run_for_states(const SelectiveScanLti& a, void* stream) {
  if (a.state <= 4) return run<T, 4, 1>(a, stream);
  if (a.state <= 64) return run<T, 16, 4>(a, stream);
  if (a.state <= 256) return run<T, 32, 8>(a, stream);
  if (a.state <= 1024) return run<T, 32, 32>(a, stream);
  return gpu::kInvalidValue;
}

}  // namespace

int selective_scan_lti_cuda(const SelectiveScanLti& args, void* stream) {
  if (args.dim == 0 || args.sequences == 0) return 0;
  return args.complex ? run_for_states<Complex>(args, stream) : run_for_states<float>(args, stream);
}

}  // namespace effinfer
