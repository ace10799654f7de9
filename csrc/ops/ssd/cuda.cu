// ssd on a GPU: the recurrence as it is written, one token after the other, so that every way of
// cutting, masking or packing a sequence gives the same bits. A block is some rows (P) of one
// head's state in one sequence; a row is spread over kLanes threads and stays in registers. A tile
// of positions at a time goes through shared memory, so that its loads are in flight together.
// One by one differs in the threads of a row alone: as many as in a step, for its bits.
#include "base/gpu.h"
#include "ops/ssd/cuda_lanes.h"
#include "ops/ssd/ssd.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 32;                 // positions, at most
constexpr int kTileStates = 128 * kTile;  // floats of B, and of C, per tile

// B and C follow, [tile][state_dim] each.
template <int kRows>
struct Shared {
  float x[kTile][kRows], gate[kTile][kRows], y[kTile][kRows];
  float step[kTile], decay[kTile];
  int32_t valid[kTile], id[kTile];
  float scratch[kThreads / gpu::kWarp];
};

template <int kLanes, int kStates>
__global__ void __launch_bounds__(kThreads) scan(Ssd a, int tile_length, int64_t row_blocks) {
  constexpr int kRows = kThreads / kLanes;
  auto& s = *gpu::shared<Shared<kRows>>();
  const int states = static_cast<int>(a.state_dim);
  float* const shared_b = reinterpret_cast<float*>(&s + 1);
  float* const shared_c = shared_b + tile_length * states;
  const int thread = static_cast<int>(threadIdx.x), part = thread % kLanes;
  const int mine = thread / kLanes;  // this thread's row in the block

  const int64_t first = blockIdx.x % row_blocks * kRows;
  const int64_t head = blockIdx.x / row_blocks % a.heads;
  const int64_t sequence = blockIdx.x / row_blocks / a.heads;
  const int64_t group = head / (a.heads / a.groups);
  const int rows = static_cast<int>(a.head_dim - first < kRows ? a.head_dim - first : kRows);
  const int own = mine < rows ? mine : 0;  // idle threads copy the first row, and keep quiet

  const bool packed = a.cu_seqlens != nullptr;
  const int64_t batch = packed ? 0 : sequence;
  int64_t begin = packed ? a.cu_seqlens[sequence] : 0;
  int64_t end = packed ? a.cu_seqlens[sequence + 1] : a.length;
  begin = begin < 0 ? 0 : begin;
  end = end > a.length ? a.length : end;  // what lies on the GPU was not checked on the host
  const auto valid = [&](int64_t t) {
    return a.mask == nullptr || a.mask[batch * a.mask_strides[0] + t * a.mask_strides[1]] != 0;
  };

  float S[kStates];
  const int64_t matrix = a.head_dim * a.state_dim, row = (first + own) * a.state_dim;
  const auto save = [&](float* state) {
    if (mine >= rows) return;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (const int n = part + i * kLanes; n < states) state[row + n] = S[i];
  };
  const auto snapshot = [&](int64_t k) {
    save(a.snapshots + ((sequence * a.snapshot_count + k) * a.heads + head) * matrix);
  };
  int64_t left = end > begin ? end - begin : 0;  // tokens not walked yet
  if (a.snapshot_count > 0 && a.mask != nullptr) {
    float count = 0.f;
    for (int64_t t = begin + thread; t < end; t += kThreads) count += valid(t) ? 1.f : 0.f;
    left = static_cast<int64_t>(gpu::block_sum(count, s.scratch));
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const int n = part + i * kLanes;
    S[i] = n < states && a.initial_state != nullptr
               ? a.initial_state[(sequence * a.heads + head) * matrix + row + n]
               : 0.f;
  }
  for (int64_t k = left; k < a.snapshot_count; ++k) snapshot(k);

  bool started = false;
  int32_t current = 0;  // the id of the last token
  for (int64_t start = begin; start < end; start += tile_length) {
    const int tile = static_cast<int>(end - start < tile_length ? end - start : tile_length);
    gpu::sync_block();  // the last tile's results have been read
    for (int i = thread; i < tile; i += kThreads) {
      const int64_t t = start + i;
      s.valid[i] = valid(t);
      s.id[i] = a.seq_idx == nullptr
                    ? 0
                    : a.seq_idx[batch * a.seq_idx_strides[0] + t * a.seq_idx_strides[1]];
      float step = gpu::load_any(
          a.dt, a.dt_type, batch * a.dt_strides[0] + t * a.dt_strides[1] + head * a.dt_strides[2]);
      if (a.dt_bias != nullptr) step += a.dt_bias[head * a.dt_bias_stride];
      if (a.dt_softplus) step = gpu::softplus(step);
      step = step < a.dt_min ? a.dt_min : step > a.dt_max ? a.dt_max : step;
      s.step[i] = step;
      s.decay[i] = expf(step * a.A[head * a.A_stride]);
    }
    const auto signal = [&](const int64_t* strides, int t, int p) {
      return batch * strides[0] + (start + t) * strides[1] + head * strides[2] +
             (first + p) * strides[3];
    };
    for (int i = thread; i < tile * rows; i += kThreads) {
      const int t = i / rows, p = i % rows;
      s.x[t][p] = gpu::load_any(a.x, a.x_type, signal(a.x_strides, t, p));
      s.gate[t][p] =
          a.z != nullptr ? gpu::silu(gpu::load_any(a.z, a.x_type, signal(a.z_strides, t, p))) : 1.f;
    }
    for (int i = thread; i < tile * states; i += kThreads) {
      const int64_t t = start + i / states, n = i % states;
      const auto at = [&](const int64_t* strides) {
        return batch * strides[0] + t * strides[1] + group * strides[2] + n * strides[3];
      };
      shared_b[i] = gpu::load_any(a.B, a.B_type, at(a.B_strides));
      shared_c[i] = gpu::load_any(a.C, a.B_type, at(a.C_strides));
    }
    gpu::sync_block();
    for (int t = 0; t < tile; ++t) {
      if (s.valid[t] == 0) {
        if (part == 0) s.y[t][mine] = 0.f;
        continue;
      }
      if (started && s.id[t] != current) {  // a new id starts from zero, and so do its snapshots
#pragma unroll
        for (int i = 0; i < kStates; ++i) S[i] = 0.f;
        for (int64_t k = 0; k < a.snapshot_count; ++k) snapshot(k);
      }
      started = true;
      current = s.id[t];
      const float x = s.x[t][own], input = s.step[t] * x, decay = s.decay[t];
      float y = 0.f;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const int n = part + i * kLanes;
        if (n >= states) break;
        S[i] = gpu::fma(decay, S[i], input * shared_b[t * states + n]);
        y = gpu::fma(shared_c[t * states + n], S[i], y);
      }
      y = gpu::lanes_sum<kLanes>(y);
      if (a.D != nullptr)
        y = gpu::fma(a.D[head * a.D_strides[0] + (first + own) * a.D_strides[1]], x, y);
      if (part == 0) s.y[t][mine] = a.z != nullptr ? y * s.gate[t][own] : y;
      if (--left < a.snapshot_count) snapshot(left);
    }
    gpu::sync_block();
    for (int i = thread; i < tile * rows; i += kThreads)
      gpu::store_any(a.y, a.x_type, signal(a.y_strides, i / rows, i % rows),
                     s.y[i / rows][i % rows]);
  }
  save(a.last_state + (sequence * a.heads + head) * matrix);
}

template <int kLanes, int kStates>
int run(const Ssd& a, void* stream) {
  constexpr int64_t kRows = kThreads / kLanes;
  const int64_t most = kTileStates / (a.state_dim > 0 ? a.state_dim : 1);
  const int tile = static_cast<int>(most < 1 ? 1 : most > kTile ? kTile : most);
  const int64_t row_blocks = (a.head_dim + kRows - 1) / kRows;
  const size_t bytes =
      sizeof(Shared<kRows>) + 2 * static_cast<size_t>(tile * a.state_dim) * sizeof(float);
  const auto blocks = static_cast<unsigned>(a.sequences * a.heads * row_blocks);
  return gpu::launch(&scan<kLanes, kStates>, dim3(blocks), kThreads, bytes, stream, a, tile,
                     row_blocks);
}

}  // namespace

int ssd_cuda(const Ssd& args, void* stream) {
  const int64_t states = args.state_dim;
  if (args.one_by_one && states <= kSsdFewStates)
    return run<kSsdFewLanes, kSsdFewStates / kSsdFewLanes>(args, stream);
  if (args.one_by_one && states <= kSsdManyStates)
    return run<kSsdLanes, kSsdManyStates / kSsdLanes>(args, stream);
  if (states <= 16) return run<8, 2>(args, stream);
  if (states <= 128) return run<8, 16>(args, stream);
  if (states <= kSsdManyStates) return run<8, 32>(args, stream);
  if (states <= 2048) return run<kSsdMostLanes, 64>(args, stream);
  return gpu::kInvalidValue;
}

}  // namespace effinfer
