// Binary ops on a GPU: rows of bits, and popcounts of rows against panels of weights on the tensor
// cores, as popcount(x ^ w) = popcount(x) + popcount(w) - 2 popcount(x & w): one AND where XOR
// would take two on Hopper.
#pragma once
#include "base/gpu.h"
#include "base/gpu_mma.h"
#include "ops/binary_linear/bits.h"
#include "ops/linear/cuda_epilogue.h"

namespace effinfer {
namespace {

using namespace binary_layout;

constexpr int kThreads = 128, kWarps = kThreads / gpu::kWarp;
constexpr int64_t kStepBytes = 32;  // of k in one mma
constexpr int64_t kTileRows = 16;   // of one mma
constexpr int kColumnTiles = 4;     // mma tiles of 8 outputs in a panel

inline int64_t padded_bytes(int64_t bytes) { return ceil_div(bytes, kStepBytes) * kStepBytes; }
inline int64_t floats_of(int64_t bytes) { return ceil_div(bytes, 16) * 4; }

// ---- rows of bits -------------------------------------------------------------------------------

template <class X, class T>
__device__ bool is_negative(const X* x, const T* threshold, int64_t i) {
  if constexpr (std::is_same_v<X, int32_t>)
    return x[i] < (threshold != nullptr ? threshold[i] : T{});
  else
    return gpu::load(x + i) < (threshold != nullptr ? threshold[i] : T{});
}

// Byte i of a row: the signs of eight values.
template <class X, class T>
struct SignBytes {
  const X* x;
  const T* threshold;
  int64_t stride, k;

  __device__ unsigned operator()(int64_t row, int64_t i) const {
    unsigned byte = 0;
    for (int64_t b = 0; b < 8 && 8 * i + b < k; ++b)
      if (is_negative(x + row * stride, threshold, 8 * i + b)) byte |= 1u << b;
    return byte;
  }
};

// Byte i of a row of packed signs, without what lies past k.
struct CopiedBytes {
  const uint8_t* x;
  int64_t stride, k;

  __device__ unsigned operator()(int64_t row, int64_t i) const {
    const int64_t valid = k - 8 * i;
    if (valid <= 0) return 0;
    return x[row * stride + i] & (valid < 8 ? (1u << valid) - 1 : 0xffu);
  }
};

// bits[row, i] = source(row, i), rows of `stride` bytes.
template <class Source>
__global__ void write_bits(Source source, uint8_t* bits, int64_t rows, int64_t stride) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at < rows * stride) bits[at] = static_cast<uint8_t>(source(at / stride, at % stride));
}

template <class Source>
int launch_bits(const Source& source, uint8_t* bits, int64_t rows, int64_t stride, void* stream) {
  const int64_t blocks = ceil_div(rows * stride, kThreads);
  if (blocks > gpu::kMaxGridX) return gpu::kInvalidValue;
  return gpu::launch(write_bits<Source>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                     source, bits, rows, stride);
}

// ---- counting -----------------------------------------------------------------------------------

struct BitProblem {
  const uint8_t* x;  // rows of whole steps, zeros past `bytes`
  const uint8_t* weight;
  int64_t x_stride, panel_stride, bytes;
  int64_t rows, n;
};

// Four bytes, wherever they lie.
__device__ inline uint32_t load_word(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 4 == 0) return *reinterpret_cast<const uint32_t*>(p);
  return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
}

// The weights of one step: column c of tile j is output 4 c + j of the panel, so that a lane reads
// four outputs at once.
__device__ inline void load_weights(const BitProblem& p, int64_t panel, int64_t step,
                                    gpu::FragmentB (&b)[kColumnTiles]) {
  const int g = gpu::lane() / 4, t = gpu::lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t byte = step + 16 * half + 4 * t + i;
      four[i] = byte < p.bytes
                    ? load_word(p.weight + panel * p.panel_stride + byte * kOutputs + 4 * g)
                    : 0;
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
      b[j].word[half] = (four[0] >> 8 * j & 255) | (four[1] >> 8 * j & 255) << 8 |
                        (four[2] >> 8 * j & 255) << 16 | (four[3] >> 8 * j & 255) << 24;
  }
}

__device__ inline gpu::FragmentA load_rows(const BitProblem& p, int64_t row, int64_t step) {
  const int g = gpu::lane() / 4, t = gpu::lane() % 4;
  gpu::FragmentA a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = row + g + i % 2 * 8;
    a.word[i] =
        at < p.rows
            ? *reinterpret_cast<const uint32_t*>(p.x + at * p.x_stride + step + i / 2 * 16 + 4 * t)
            : 0;
  }
  return a;
}

// Each warp counts kTiles x 16 rows against one panel, and hands every count to finish(row, n,
// count).
template <int kTiles, class Finish>
__global__ void __launch_bounds__(kThreads) count(BitProblem p, Finish finish) {
  const int64_t row = int64_t{blockIdx.x} * kTiles * kTileRows;
  const int64_t panel = int64_t{blockIdx.y} * kWarps + gpu::warp();
  if (panel * kOutputs >= p.n) return;
  gpu::IntegerFragmentC both[kTiles][kColumnTiles] = {};
  int of_x[kTiles][2] = {}, of_w[kColumnTiles] = {};
  for (int64_t step = 0; step < p.bytes; step += kStepBytes) {
    gpu::FragmentB b[kColumnTiles];
    load_weights(p, panel, step, b);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
      of_w[j] += gpu::popcount(b[j].word[0]) + gpu::popcount(b[j].word[1]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const gpu::FragmentA a = load_rows(p, row + tile * kTileRows, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) of_x[tile][i % 2] += gpu::popcount(a.word[i]);
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) gpu::mma_and_popcount(both[tile][j], a, b[j]);
    }
  }
  // Sums below 2^24 are exact in float32, which is what shuffles carry.
  const int g = gpu::lane() / 4, t = gpu::lane() % 4;
  int of_columns[kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const float sum = gpu::lanes_sum<4>(static_cast<float>(of_w[j]));
    of_columns[j][0] = static_cast<int>(gpu::shuffle(sum, 8 * t));
    of_columns[j][1] = static_cast<int>(gpu::shuffle(sum, 8 * t + 4));
  }
  // Through shared memory, so that a lane finishes one output of row after row.
  int* const counts = gpu::shared<int>() + gpu::warp() * kTileRows * kOutputs;
  const int64_t n = panel * kOutputs + gpu::lane();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto of_row =
          static_cast<int>(gpu::lanes_sum<4>(static_cast<float>(of_x[tile][i / 2 % 2])));
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
        counts[(g + i / 2 * 8) * kOutputs + 4 * (2 * t + i % 2) + j] =
            of_row + of_columns[j][i % 2] - 2 * both[tile][j].v[i];
    }
    gpu::sync_warp();
    const int64_t first = row + tile * kTileRows;
#pragma unroll 1
    for (int r = 0; r < kTileRows; ++r)
      if (first + r < p.rows && n < p.n) finish(first + r, n, counts[r * kOutputs + gpu::lane()]);
    gpu::sync_warp();
  }
}

template <int kTiles, class Finish>
int launch_tiles(const BitProblem& p, const Finish& finish, void* stream) {
  const int64_t across = ceil_div(panels_of(p.n), kWarps);
  const int64_t down = ceil_div(p.rows, kTiles * kTileRows);
  if (across > gpu::kMaxGridYZ || down > gpu::kMaxGridX) return gpu::kInvalidValue;
  const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across));
  return gpu::launch(count<kTiles, Finish>, grid, kThreads,
                     kWarps * kTileRows * kOutputs * sizeof(int), stream, p, finish);
}

template <class Finish>
int launch_count(const BitProblem& p, const Finish& finish, void* stream) {
  return p.rows <= kTileRows ? launch_tiles<1>(p, finish, stream)
                             : launch_tiles<4>(p, finish, stream);
}

// xs ws (terms - 2 count) + bias, its epilogue and residual.
struct FloatFinish {
  const float *weight_scale, *bias, *x_scale;  // or null
  const void* residual;
  void* y;
  int64_t residual_stride, y_stride;
  DType type;
  Epilogue epilogue;

  __device__ void operator()(int64_t row, int64_t n, int terms, int count) const {
    const auto dot = static_cast<float>(terms - 2 * count);
    const float scale = weight_scale != nullptr ? weight_scale[n] : 1.f;
    const float add = bias != nullptr ? bias[n] : 0.f;
    float v =
        x_scale != nullptr ? fmaf(gpu::mul(dot, scale), x_scale[row], add) : fmaf(dot, scale, add);
    v = activate(epilogue, v);
    if (residual != nullptr) v += gpu::load_any(residual, type, row * residual_stride + n);
    gpu::store_any(y, type, row * y_stride + n, v);
  }
};

}  // namespace
}  // namespace effinfer
