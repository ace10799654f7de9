// linear without tensor cores, float32 sums, for weights of any kind: a Weights type hands them
// out. Every output is summed in one order, whatever the number of rows: blocks of kStep products
// in ascending k, each from a fresh accumulator, the blocks added in ascending order. Few rows: the
// weights' bytes set the pace, so the blocks of k are spread over the threads of a panel. Many
// rows: tiles of 64 x 64 through shared memory.
#pragma once
#include "base/gpu.h"
#include "ops/linear/cuda_epilogue.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 32;  // products per block of k

// ---- few rows: one panel (or a gate and up pair) x kFewRows rows per block ----------------------

constexpr int kFewRows = 8;
constexpr int kSplits = kThreads / kPanel;  // blocks of k in flight
constexpr int kXStride32 = kStep + 1;       // so that two splits of a warp read different banks

struct FewRows {
  float x[kFewRows][kSplits][kXStride32];
  float sums[kSplits][kFewRows][kPanel];
};

template <class Weights>
__global__ void __launch_bounds__(kThreads) few_rows(Linear a, Weights weights) {
  FewRows& s = *gpu::shared<FewRows>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kPanel, split = thread / kPanel;
  const int count = takes_two(a.epilogue) ? 2 : 1;
  const int64_t row = int64_t{blockIdx.y} * kFewRows;
  const int rows = static_cast<int>(a.rows - row < kFewRows ? a.rows - row : kFewRows);
  // This thread adds up output `lane` of row `split` (the first kFewRows splits do).
  float totals[2] = {0.f, 0.f};
  for (int64_t begin = 0; begin < a.k; begin += kSplits * kStep) {
    const int64_t left = a.k - begin;
    for (int i = thread; i < kFewRows * kSplits * kStep; i += kThreads) {
      const int r = i / (kSplits * kStep), k = i % (kSplits * kStep);
      s.x[r][k / kStep][k % kStep] =
          r < rows && k < left ? gpu::load_any(a.x, a.x_type, (row + r) * a.x_stride + begin + k)
                               : 0.f;
    }
    gpu::sync_block();
    const int64_t first = begin + split * kStep, rest = a.k - first;
    const int steps = static_cast<int>(rest < kStep ? rest : kStep);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == count) break;
      const int64_t panel = int64_t{blockIdx.x} * count + half;
      float sums[kFewRows] = {};
      weights.each(panel, first, steps, lane, [&](int k, float weight) {
#pragma unroll
        for (int r = 0; r < kFewRows; ++r) sums[r] = gpu::fma(s.x[r][split][k], weight, sums[r]);
      });
#pragma unroll
      for (int r = 0; r < kFewRows; ++r) s.sums[split][r][lane] = sums[r];
      gpu::sync_block();
      if (split < kFewRows) {
        const int64_t blocks = (left + kStep - 1) / kStep;
        for (int b = 0; b < kSplits && b < blocks; ++b) totals[half] += s.sums[b][split][lane];
      }
      gpu::sync_block();
    }
  }
  const int64_t n = int64_t{blockIdx.x} * kPanel + lane;
  if (split < rows && n < a.n) finish(a, row + split, n, totals[0], totals[1]);
}

// ---- many rows: 64 rows x 4 panels per block, 4 x 4 outputs per thread --------------------------

constexpr int kTileRows = 64, kTilePanels = 4, kTileN = kTilePanels * kPanel;
constexpr int kStaged = kStep * kTileN / kThreads;  // weights of one output a thread stages
constexpr int kTileXStride = kTileRows + 4;         // rows stay 16-byte aligned

struct alignas(16) Four {
  float v[4];
};

struct Tile {
  alignas(16) float x[kStep][kTileXStride];
  alignas(16) float w[kStep][kTileN];
};

template <class Weights>
__global__ void __launch_bounds__(kThreads)
    many_rows(Linear a, Weights weights, int64_t panels_in_all) {
  Tile& s = *gpu::shared<Tile>();
  const int thread = static_cast<int>(threadIdx.x);
  const int count = takes_two(a.epilogue) ? 2 : 1;
  const int64_t row = int64_t{blockIdx.y} * kTileRows, panel = int64_t{blockIdx.x} * kTilePanels;
  const int my_row = thread / (kTileN / 4) * 4, my_n = thread % (kTileN / 4) * 4;
  const int staged_n = thread % kTileN, staged_k = thread / kTileN * kStaged;
  float totals[4][4] = {};
  for (int64_t begin = 0; begin < a.k; begin += kStep) {
    for (int i = thread; i < kTileRows * kStep; i += kThreads) {
      const int r = i / kStep, k = i % kStep;
      s.x[k][r] = row + r < a.rows && begin + k < a.k
                      ? gpu::load_any(a.x, a.x_type, (row + r) * a.x_stride + begin + k)
                      : 0.f;
    }
    const int64_t rest = a.k - begin - staged_k;
    const int staged = static_cast<int>(rest < kStaged ? rest : kStaged);
#pragma unroll
    for (int i = 0; i < kStaged; ++i) s.w[staged_k + i][staged_n] = 0.f;
    if (panel + staged_n / kPanel < panels_in_all)
      weights.each(panel + staged_n / kPanel, begin + staged_k, staged, staged_n % kPanel,
                   [&](int i, float weight) { s.w[staged_k + i][staged_n] = weight; });
    gpu::sync_block();
    float sums[4][4] = {};
#pragma unroll 8
    for (int k = 0; k < kStep; ++k) {
      const Four x = *reinterpret_cast<const Four*>(&s.x[k][my_row]);
      const Four w = *reinterpret_cast<const Four*>(&s.w[k][my_n]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = gpu::fma(x.v[i], w.v[j], sums[i][j]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) totals[i][j] += sums[i][j];
    gpu::sync_block();
  }
  // A pair's gate and up lie one panel apart, in different threads: they meet in shared memory.
  float(*out)[kTileN] = reinterpret_cast<float(*)[kTileN]>(&s);
  static_assert(sizeof(Tile) >= sizeof(float) * kTileRows * kTileN);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) out[my_row + i][my_n + j] = totals[i][j];
  gpu::sync_block();
  const int outputs = kTileN / count;
  for (int i = thread; i < kTileRows * outputs; i += kThreads) {
    const int r = i / outputs, o = i % outputs;
    const int first = o / kPanel * count * kPanel + o % kPanel;
    const int64_t n = panel / count * kPanel + o;
    if (row + r < a.rows && n < a.n)
      finish(a, row + r, n, out[r][first], count == 2 ? out[r][first + kPanel] : 0.f);
  }
}

template <class Weights>
int linear_float(const Linear& a, const Weights& weights, void* stream) {
  if (a.rows <= 2 * kFewRows) {
    const dim3 grid(static_cast<unsigned>(ceil_div(a.n, kPanel)),
                    static_cast<unsigned>(ceil_div(a.rows, kFewRows)));
    return gpu::launch(&few_rows<Weights>, grid, kThreads, sizeof(FewRows), stream, a, weights);
  }
  return over_rows(a, kTileRows, [&](const Linear& part, unsigned row_tiles) {
    const dim3 grid(static_cast<unsigned>(ceil_div(panels(a), kTilePanels)), row_tiles);
    return gpu::launch(&many_rows<Weights>, grid, kThreads, sizeof(Tile), stream, part, weights,
                       panels(a));
  });
}

}  // namespace
}  // namespace effinfer
