// selective_scan on a GPU: the recurrence as it is written, one token after the other, so that
// every way of cutting, masking or packing a sequence gives the same bits. A block is a few
// channels of one sequence; each channel's states are spread over kLanes threads and stay in
// registers. A tile of positions at a time goes through shared memory, so that its loads are in
// flight together.
#include "base/gpu.h"
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

constexpr int kThreads = 64;
constexpr int kTile = 32;                 // positions, at most
constexpr int kTileStates = 128 * kTile;  // floats of B, and of C, per tile

__device__ float at(const ScanSignal& s, int64_t batch, int64_t channel, int64_t time) {
  return gpu::load_any(s.data, s.type, batch * s.batch + channel * s.channel + time * s.time);
}

__device__ float at(const ScanMatrix& m, int64_t batch, int64_t group, int64_t n, int64_t time) {
  return gpu::load_any(m.data, m.type,
                       batch * m.batch + group * m.group + n * m.state + time * m.time);
}

// How the channels are cut: a block's share one group of B and C, and so does the grid's order.
struct Cut {
  int64_t group_channels, blocks_per_group, blocks_per_sequence;
  int tile;  // positions per tile
};

// Shared memory of a block. Signals are [kTile][channels], B and C [tile][state].
template <int kChannels>
struct Shared {
  float u[kTile][kChannels], step[kTile][kChannels], gate[kTile][kChannels], y[kTile][kChannels];
  float valid[kTile];
  float scratch[kThreads / gpu::kWarp];
};

template <int kLanes, int kStates>
__global__ void __launch_bounds__(kThreads) scan(SelectiveScan a, Cut cut) {
  constexpr int kChannels = kThreads / kLanes;
  auto& s = *gpu::shared<Shared<kChannels>>();
  float* const shared_b = reinterpret_cast<float*>(&s + 1);
  float* const shared_c = shared_b + cut.tile * a.state;
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanes;
  const int mine = thread / kLanes;  // this thread's channel in the block

  const int64_t sequence = blockIdx.x / cut.blocks_per_sequence;
  const int64_t block = blockIdx.x % cut.blocks_per_sequence;
  const int64_t offset = block % cut.blocks_per_group * kChannels;
  const int64_t first = block / cut.blocks_per_group * cut.group_channels + offset;
  const int64_t rest = cut.group_channels - offset;
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

  float h[kStates], A[kStates], B[kStates], C[kStates];
  const int64_t row = (sequence * a.dim + channel) * a.state;
  const int64_t b_group = channel / (a.dim / a.B.groups), c_group = channel / (a.dim / a.C.groups);
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const int64_t n = part + i * kLanes;
    const bool in = n < a.state;
    A[i] = in ? a.A[channel * a.state + n] : 0.f;
    B[i] = in && a.B.constant ? at(a.B, 0, b_group, n, 0) : 0.f;
    C[i] = in && a.C.constant ? at(a.C, 0, c_group, n, 0) : 0.f;
    h[i] = in && a.initial_state != nullptr ? a.initial_state[row + n] : 0.f;
  }
  const auto save = [&](float* to) {
    if (mine >= channels) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (const int64_t n = part + i * kLanes; n < a.state) to[n] = h[i];
  };
  const auto snapshot = [&](int64_t k) {
    if (k < a.num_snapshots)
      save(a.snapshots + ((sequence * a.num_snapshots + k) * a.dim + channel) * a.state);
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
  for (int64_t start = begin; start < end; start += cut.tile) {
    const int tile = static_cast<int>(end - start < cut.tile ? end - start : cut.tile);
    const auto position = [&](int i) {
      return a.reverse ? end - 1 - (start - begin) - i : start + i;
    };
    gpu::sync_block();  // the last tile's results have been read
    for (int i = thread; i < tile; i += kThreads) s.valid[i] = valid(position(i)) ? 1.f : 0.f;
    for (int i = thread; i < tile * channels; i += kThreads) {
      // Neighbouring threads take neighbouring memory, whichever way the signals lie.
      const int t = a.u.channel == 1 ? i / channels : i % tile;
      const int c = a.u.channel == 1 ? i % channels : i / tile;
      const int64_t d = first + c, p = position(t);
      const float step =
          at(a.delta, batch, d, p) + (a.delta_bias != nullptr ? a.delta_bias[d] : 0.f);
      s.u[t][c] = at(a.u, batch, d, p);
      s.step[t][c] = a.softplus ? gpu::softplus(step) : step;
      s.gate[t][c] = a.z.data != nullptr ? gpu::silu(at(a.z, batch, d, p)) : 1.f;
    }
    const int states = static_cast<int>(a.state);
    for (int i = thread; i < tile * states; i += kThreads) {
      // As above; a row of shared memory is one position.
      const bool across = a.B.state == 1 && a.C.state == 1;
      const int t = across ? i / states : i % tile, n = across ? i % states : i / tile;
      const int64_t p = position(t);
      if (!a.B.constant) shared_b[t * states + n] = at(a.B, batch, b_group, n, p);
      if (!a.C.constant) shared_c[t * states + n] = at(a.C, batch, c_group, n, p);
    }
    gpu::sync_block();
    for (int t = 0; t < tile; ++t) {
      if (s.valid[t] == 0.f) {
        if (part == 0) s.y[t][mine] = 0.f;
        continue;
      }
      const int c = mine < channels ? mine : 0;
      const float step = s.step[t][c], u = s.u[t][c], input = step * u;
      float y = part == 0 && a.D != nullptr ? D * u : 0.f;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = part + i * kLanes;
        if (n >= states) break;
        const float b = a.B.constant ? B[i] : shared_b[t * states + n];
        const float w = a.C.constant ? C[i] : shared_c[t * states + n];
        h[i] = gpu::fma(expf(step * A[i]), h[i], input * b);
        y = gpu::fma(w, h[i], y);
      }
      y = gpu::lanes_sum<kLanes>(y);
      if (part == 0) s.y[t][mine] = a.z.data != nullptr ? y * s.gate[t][c] : y;
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
  save(a.last_state + row);
}

template <int kLanes, int kStates>
int run(const SelectiveScan& a, void* stream) {
  constexpr int kChannels = kThreads / kLanes;
  const int64_t b_groups = a.B.constant ? 1 : a.B.groups, c_groups = a.C.constant ? 1 : a.C.groups;
  const int64_t groups = b_groups > c_groups ? b_groups : c_groups;
  const int64_t most = kTileStates / (a.state > 0 ? a.state : 1);
  Cut cut = {};
  cut.group_channels = a.dim / groups;
  cut.blocks_per_group = (cut.group_channels + kChannels - 1) / kChannels;
  cut.blocks_per_sequence = groups * cut.blocks_per_group;
  cut.tile = static_cast<int>(most < 1 ? 1 : most > kTile ? kTile : most);
  const size_t bytes =
      sizeof(Shared<kChannels>) + 2 * static_cast<size_t>(cut.tile * a.state) * sizeof(float);
  const auto blocks = static_cast<unsigned>(a.sequences * cut.blocks_per_sequence);
  return gpu::launch(&scan<kLanes, kStates>, dim3(blocks), kThreads, bytes, stream, a, cut);
}

}  // namespace

int selective_scan_cuda(const SelectiveScan& args, void* stream) {
  if (args.dim == 0 || args.sequences == 0) return 0;
  if (args.state <= 16) return run<4, 4>(args, stream);
  if (args.state <= 64) return run<16, 4>(args, stream);
  if (args.state <= 256) return run<32, 8>(args, stream);
  if (args.state <= 2048) return run<32, 64>(args, stream);
  return gpu::kInvalidValue;
}

}  // namespace effinfer
