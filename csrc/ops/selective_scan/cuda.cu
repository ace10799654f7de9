// selective_scan on a GPU, parallel over time. A block takes 16 channels of one sequence through
// chunks of 128 tokens: a thread has 8 consecutive tokens of two channels, 16 neighbouring lanes
// the chunk. For every n a thread walks its tokens from a zero state, the lanes combine these
// (decay, state) pairs by an associative scan, and the thread walks again from the state it starts
// at. Chunks follow one another in the block; segments of 16 chunks may also be walked by a block
// each, once for the state they add and once for the outputs. Either way a segment starts at
//   fold(decay of the segment, state before, state it adds),
// so that cutting the work up changes no bit.
//
// Per (token, channel, n): one exp2, 7 float operations, 10/8 shuffles, and 4 bytes of B and C
// from shared memory. Bytes: u, delta, z, y once, B and C once per 16 channels; with segments
// apart u, delta and B twice. The special function units' floor, 16 exp2 a cycle and
// multiprocessor, is above that of the bytes for half-width signals at N = 16, and about at it for
// float32.
#include "base/gpu.h"
#include "ops/scan/gpu_tokens.h"
#include "ops/selective_scan/cuda_tile.h"
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

constexpr int64_t kSegment = 16 * kChunk;  // tokens
constexpr int64_t kMaxStates = 320;        // 99 KB of shared memory
constexpr int64_t kEnoughBlocks = 256;     // not worth a second pass from here on
constexpr float kLog2e = 1.44269504f;

struct Cut {  // a block's channels share one group of B and C
  int64_t group_channels, blocks_per_group, blocks_per_sequence;
  int64_t segments;  // per sequence, at most, that are walked by blocks of their own; or 1
};

// A chunk's signals and matrices, [row][token]; y takes the place of u. The tokens of a row lie so
// that neighbouring lanes read neighbouring 16 bytes.
struct Shared {
  alignas(16) float u[kChannels][kRow], step[kChannels][kRow];
  alignas(16) float b[kTileStates][kRow], c[kTileStates][kRow];
  int position[kChunk];
  float scratch[kThreads / gpu::kWarp + 1];
  float segment_step[kChannels];  // sum of the steps
};

// Behind it: [state][kChannels] each.
struct States {
  float* rate;   // A log2(e)
  float* start;  // at the start of the segment
  float* added;  // by the segment's tokens so far
};

// Where a segment's summary lies: per channel its states from zero, and the sum of its steps.
__device__ float* summary_of(const SelectiveScan& a, const Cut& cut, const Walk& walk,
                             int64_t sequence, int64_t segment) {
  const int64_t first =
      a.cu_seqlens != nullptr ? walk.begin / kSegment + sequence : sequence * cut.segments;
  return static_cast<float*>(a.scratch) + (first + segment) * a.dim * (a.state + 1);
}

// What a segment from `start` ends with, given what it added.
__device__ float fold(float rate, float steps, float start, float added) {
  return gpu::fma(gpu::exp2_fast(rate * steps), start, added);
}

// The channels and tokens of a block.
struct Block {
  int64_t sequence, batch, segment;
  int64_t first;   // channel
  int channels;    // from there on
  int64_t tokens;  // of the whole sequence

  __device__ Block(const SelectiveScan& a, const Cut& cut)
      : sequence(blockIdx.x / cut.blocks_per_sequence),
        batch(a.cu_seqlens != nullptr ? 0 : sequence),
        segment(blockIdx.y),
        tokens(0) {
    const int64_t block = blockIdx.x % cut.blocks_per_sequence;
    const int64_t skipped = block % cut.blocks_per_group * kChannels;
    const int64_t rest = cut.group_channels - skipped;
    first = block / cut.blocks_per_group * cut.group_channels + skipped;
    channels = static_cast<int>(rest < kChannels ? rest : kChannels);
  }
};

// Rows first_n, first_n + 1, ... of B or C.
__device__ void fill(float (*tile)[kRow], const ScanMatrix& m, int64_t dim, const Block& block,
                     int first_n, int n, const int* position) {
  const int64_t group = block.first / (dim / m.groups);
  const int64_t first = block.batch * m.batch + group * m.group + first_n * m.state;
  fill(tile, offset(m.data, m.type, first), m.type, m.state, m.time, n, position,
       [](float x, int) { return x; });
}

// The value of a constant B or C, for every token; of another, nothing.
__device__ void repeat_constant(const ScanMatrix& m, int64_t channel, int n, float (&to)[kItems]) {
  if (!m.constant) return;
  const float x = gpu::load_any(m.data, m.type, channel * m.group + n * m.state);
#pragma unroll
  for (int t = 0; t < kItems; ++t) to[t] = x;
}

// The states this block starts with, and what a sequence of few tokens or none ends with.
__device__ void start_states(const SelectiveScan& a, const Cut& cut, const Walk& walk,
                             const Block& block, const States& h, bool summary_only) {
  const int64_t size = a.dim * a.state;
  for (int i = static_cast<int>(threadIdx.x); i < a.state * kChannels; i += kThreads) {
    const int n = i / kChannels, c = i % kChannels;
    const int64_t from = (block.first + c) * a.state + n;
    h.rate[i] = h.start[i] = h.added[i] = 0.f;
    if (c >= block.channels) continue;
    h.rate[i] = a.A[from] * kLog2e;
    if (summary_only) continue;
    float start = a.initial_state != nullptr ? a.initial_state[block.sequence * size + from] : 0.f;
    for (int64_t past = 0; past < block.segment; ++past) {
      const float* summary = summary_of(a, cut, walk, block.sequence, past);
      start = fold(h.rate[i], summary[size + block.first + c], start, summary[from]);
    }
    h.start[i] = start;
    if (block.segment > 0) continue;
    if (block.tokens == 0) a.last_state[block.sequence * size + from] = start;
    for (int64_t k = block.tokens; k < a.num_snapshots; ++k)
      a.snapshots[(block.sequence * a.num_snapshots + k) * size + from] = start;
  }
}

// A thread's tokens of one channel: their states are decay before + input.
struct Steps {
  float decay[kItems], input[kItems];
};

// The state of (channel, n) at the end of the sequence and up to num_snapshots tokens before, where
// these are among this thread's tokens. `left`: tokens of the sequence after this thread's first.
__device__ void save(const SelectiveScan& a, const Block& block, int64_t left, const Steps& steps,
                     float state, int channel, int n) {
  const int64_t keep = a.num_snapshots > 1 ? a.num_snapshots : 1, size = a.dim * a.state;
  if (left < 0 || left >= keep + kItems || channel >= block.channels) return;
  const int64_t to = (block.first + channel) * a.state + n;
  float* snapshot = a.snapshots + (block.sequence * a.num_snapshots + left) * size + to;
#pragma unroll
  for (int t = 0; t < kItems; ++t, --left, snapshot -= size) {
    state = gpu::fma(steps.decay[t], state, steps.input[t]);
    if (left == 0) a.last_state[block.sequence * size + to] = state;
    if (left >= 0 && left < a.num_snapshots) *snapshot = state;
  }
}

// The chunk's y, gated, to where it belongs. y lies in the place of u; the steps' place is free.
__device__ void write_outputs(const SelectiveScan& a, const Block& block, Shared& s) {
  gpu::sync_block();
  if (a.z.data != nullptr) {
    fill(s.step, a.z, block.batch, block.first, block.channels, s.position,
         [](float x, int) { return gpu::silu(x); });
    gpu::sync_block();
  }
  const int64_t first = block.batch * a.y.batch + block.first * a.y.channel;
#pragma unroll 4
  for (int i = 0; i < kFill; ++i) {
    const Place at(a.y.channel == 1, i);
    const int p = s.position[at.token];
    if (p < 0 || at.row >= block.channels) continue;
    float y = s.u[at.row][slot(at.token)];
    if (a.z.data != nullptr) y *= s.step[at.row][slot(at.token)];
    gpu::store_any(a.y.data, a.y.type, first + at.row * a.y.channel + p * a.y.time, y);
  }
}

// kSummary: only what the segment adds to the state, into the scratch. kConstant: B or C is.
template <bool kSummary, bool kConstant>
__global__ void __launch_bounds__(kThreads, 3) scan(SelectiveScan a, Cut cut) {
  Shared& s = *gpu::shared<Shared>();
  const int states = static_cast<int>(a.state), thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kLanes, mine = thread / kLanes;  // and mine + kGroups
  float* const behind = reinterpret_cast<float*>(&s + 1);
  const States h = {behind, behind + states * kChannels, behind + 2 * states * kChannels};

  Block block(a, cut);
  Walk walk = {a.mask == nullptr ? nullptr : a.mask + block.batch * a.mask_batch,
               a.mask_time,
               0,
               0,
               a.reverse,
               block.segment * kSegment};
  set_range(walk, a.cu_seqlens, block.sequence, a.length);
  block.tokens = count_tokens<kThreads>(walk, s.scratch);
  int64_t done = block.segment * kSegment;
  const bool whole = cut.segments == 1, last = done + kSegment >= block.tokens;
  if (block.segment > 0 && done >= block.tokens) return;
  if (kSummary && last) return;  // nobody folds it
  const int64_t stop = whole || last ? block.tokens : done + kSegment;
  start_states(a, cut, walk, block, h, kSummary);

  float segment_step[kPair] = {};
  while (done < stop) {
    gpu::sync_block();  // the states are there; the last chunk's results have been read
    const int count = next_tokens<kChunk, kThreads>(walk, s.position, s.scratch, [&](int64_t p) {
      for (int64_t c = block.first; c < block.first + block.channels; ++c)
        gpu::store_any(a.y.data, a.y.type, block.batch * a.y.batch + c * a.y.channel + p * a.y.time,
                       0.f);
    });
    fill(s.u, a.u, block.batch, block.first, block.channels, s.position,
         [](float x, int) { return x; });
    fill(s.step, a.delta, block.batch, block.first, block.channels, s.position,
         [&](float x, int c) {
           if (a.delta_bias != nullptr) x += a.delta_bias[block.first + c];
           return a.softplus ? gpu::softplus(x) : x;
         });
    float step[kPair][kItems], drive[kPair][kItems], y[kPair][kItems], sum[kPair];
    int first_n = 0;
    do {
      const int tile = states - first_n < kTileStates ? states - first_n : kTileStates;
      if (first_n > 0) gpu::sync_block();  // the last tile has been read
      if (!a.B.constant) fill(s.b, a.B, a.dim, block, first_n, tile, s.position);
      if (!kSummary && !a.C.constant) fill(s.c, a.C, a.dim, block, first_n, tile, s.position);
      gpu::sync_block();
      if (first_n == 0) {
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          const int c = mine + k * kGroups;
          const float D = a.D != nullptr && c < block.channels ? a.D[block.first + c] : 0.f;
          read(s.step[c], lane, step[k]);
          read(s.u[c], lane, drive[k]);
          sum[k] = 0.f;
#pragma unroll
          for (int t = 0; t < kItems; ++t) {
            y[k][t] = a.D != nullptr ? D * drive[k][t] : 0.f;
            drive[k][t] *= step[k][t];
            sum[k] += step[k][t];
          }
        }
      }
      for (int i = 0; i < tile; ++i) {
        const int n = first_n + i;
        float b[kItems] = {}, c[kItems] = {};
        if (!kConstant || !a.B.constant) read(s.b[i], lane, b);
        if (!kSummary && (!kConstant || !a.C.constant)) read(s.c[i], lane, c);
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          const int channel = mine + k * kGroups, at = n * kChannels + channel;
          if constexpr (kConstant) {
            const int64_t d = block.first + (channel < block.channels ? channel : 0);
            repeat_constant(a.B, d, n, b);
            if (!kSummary) repeat_constant(a.C, d, n, c);
          }
          const float rate = h.rate[at], added = h.added[at];
          Steps steps;
          float state = 0.f, product = gpu::exp2_fast(sum[k] * rate);
#pragma unroll
          for (int t = 0; t < kItems; ++t) {
            steps.decay[t] = gpu::exp2_fast(step[k][t] * rate);
            steps.input[t] = drive[k][t] * b[t];
            state = gpu::fma(steps.decay[t], state, steps.input[t]);
          }
#pragma unroll
          for (int m = 1; m < kLanes; m *= 2) {
            const float state_before = gpu::shuffle_up(state, m);
            const float product_before = gpu::shuffle_up(product, m);
            if (lane >= m) {
              state = gpu::fma(product, state_before, state);
              product *= product_before;
            }
          }
          if constexpr (!kSummary) {
            const float before = gpu::shuffle_up(state, 1), so_far = gpu::shuffle_up(product, 1);
            const float start = fold(rate, segment_step[k], h.start[at], added);
            const float from = lane == 0 ? start : gpu::fma(so_far, start, before);
            float now = from;
#pragma unroll
            for (int t = 0; t < kItems; ++t) {
              now = gpu::fma(steps.decay[t], now, steps.input[t]);
              y[k][t] = gpu::fma(c[t], now, y[k][t]);
            }
            save(a, block, block.tokens - 1 - done - lane * kItems, steps, from, channel, n);
          }
          gpu::sync_warp();  // every lane has read what the last one replaces
          if (lane == kLanes - 1) h.added[at] = gpu::fma(product, added, state);
        }
      }
      first_n += kTileStates;
    } while (first_n < states);
    done += count;
#pragma unroll
    for (int k = 0; k < kPair; ++k) segment_step[k] += gpu::lanes_sum<kLanes>(sum[k]);
    if (whole && done % kSegment == 0) {  // the next segment starts here
      gpu::sync_warp();
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
        for (int n = lane; n < states; n += kLanes) {
          const int at = n * kChannels + mine + k * kGroups;
          h.start[at] = fold(h.rate[at], segment_step[k], h.start[at], h.added[at]);
          h.added[at] = 0.f;
        }
        segment_step[k] = 0.f;
      }
    }
    if constexpr (!kSummary) {
#pragma unroll
      for (int k = 0; k < kPair; ++k)
#pragma unroll
        for (int t = 0; t < kItems; ++t) s.u[mine + k * kGroups][slot(lane * kItems + t)] = y[k][t];
      write_outputs(a, block, s);
    }
  }
  if constexpr (kSummary) {
    if (lane == 0)
      for (int k = 0; k < kPair; ++k) s.segment_step[mine + k * kGroups] = segment_step[k];
    gpu::sync_block();
    float* const summary = summary_of(a, cut, walk, block.sequence, block.segment);
    for (int i = thread; i < states * block.channels; i += kThreads)
      summary[block.first * a.state + i] = h.added[i % states * kChannels + i / states];
    for (int c = thread; c < block.channels; c += kThreads)
      summary[a.dim * a.state + block.first + c] = s.segment_step[c];
  }
}

Cut cut_of(const SelectiveScan& a) {
  const int64_t b_groups = a.B.constant ? 1 : a.B.groups, c_groups = a.C.constant ? 1 : a.C.groups;
  const int64_t groups = b_groups > c_groups ? b_groups : c_groups;
  Cut cut = {};
  cut.group_channels = a.dim / groups;
  cut.blocks_per_group = (cut.group_channels + kChannels - 1) / kChannels;
  cut.blocks_per_sequence = groups * cut.blocks_per_group;
  // Tokens are counted before they are cut, so a mask would be read once per segment.
  const bool alone = a.mask != nullptr || a.sequences * cut.blocks_per_sequence >= kEnoughBlocks;
  cut.segments = alone ? 1 : (a.length + kSegment - 1) / kSegment;
  return cut;
}

template <bool kConstant>
int run(const SelectiveScan& a, void* stream) {
  Cut cut = cut_of(a);
  if (a.scratch == nullptr || cut.segments == 0) cut.segments = 1;
  const size_t bytes =
      sizeof(Shared) + 3 * static_cast<size_t>(a.state) * kChannels * sizeof(float);
  const dim3 grid(static_cast<unsigned>(a.sequences * cut.blocks_per_sequence),
                  static_cast<unsigned>(cut.segments));
  if (cut.segments > 1)
    if (const int status =
            gpu::launch(&scan<true, kConstant>, grid, kThreads, bytes, stream, a, cut);
        status != 0)
      return status;
  return gpu::launch(&scan<false, kConstant>, grid, kThreads, bytes, stream, a, cut);
}

}  // namespace

int64_t selective_scan_cuda_scratch(const SelectiveScan& a) {
  if (a.dim == 0 || a.sequences == 0) return 0;
  const int64_t segments = cut_of(a).segments;
  if (segments < 2) return 0;
  const int64_t slots =
      a.cu_seqlens != nullptr ? a.length / kSegment + a.sequences : a.sequences * segments;
  return slots * a.dim * (a.state + 1);
}

int selective_scan_cuda(const SelectiveScan& args, void* stream) {
  if (args.dim == 0 || args.sequences == 0) return 0;
  if (args.state > kMaxStates) return gpu::kInvalidValue;
  return args.B.constant || args.C.constant ? run<true>(args, stream) : run<false>(args, stream);
}

}  // namespace effinfer
