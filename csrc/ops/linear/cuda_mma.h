// linear on tensor cores, for x and weights of one 16-bit type. A panel's 16 outputs are the rows
// of mma.m16n8k16, rows of x its columns. Every output is a chain of mma over kBlock products in
// ascending k from a fresh accumulator; the blocks are added in ascending order, in float32. That
// chain is the same in both kernels, so a row's bits do not depend on the number of rows.
//
// Few rows (up to 16): 2 k 16 bytes of weights per panel are the floor; each warp has blocks of k
// of its own and copies one block of weights ahead, 16 bytes a thread, 4 KB a warp on their way.
// Many rows: tiles of kPanels panels x 128 rows, a warp 32 x 64 of them, three stages of 32 k in
// shared memory. Per stage and warp 6 KB are read from there for 32 mma: at the full rate of an
// A100's tensor cores 96 of the 128 bytes a cycle there are. From L2 come 2 (16 kPanels + 128)
// bytes per k and tile.
#pragma once
#include "base/gpu_mma.h"
#include "ops/linear/cuda_epilogue.h"

namespace effinfer {
namespace {

constexpr int kBlock = 128;  // products per accumulator

// The element of a panel's row that tile row `position` holds: the inverse of place().
template <class T>
__device__ int output_at(int position) {
  return std::is_same_v<T, bf16> ? position / 2 + position % 2 * 8 : position;
}

// Weights in shared memory are as in the panel, [k][16], but for 16-byte halves that change places
// every 4 k, so that 8 rows of a matrix lie in different banks.
template <class T>
__device__ T* half_of(T* tile, int k, int half) {
  return tile + k * kPanel + (half ^ (k / 4 % 2)) * 8;
}

template <class T>
__device__ gpu::FragmentA weights_at(T* tile, int k) {
  gpu::FragmentA a;
  const int matrix = gpu::lane() / 8;
  gpu::load_matrices<true>(a.word, half_of(tile, k + matrix / 2 * 8 + gpu::lane() % 8, matrix % 2));
  return a;
}

// ---- few rows: a panel (or a gate and up pair) x up to 16 rows per block ------------------------

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / gpu::kWarp;
constexpr int kMostFewRows = 16;

template <class T>
struct FewRowsShared {
  alignas(16) T weights[kFewWarps][2][kBlock * kPanel];
  float sums[kFewWarps][2][kPanel][kMostFewRows + 1];
};

// Words (row, k..k+1) and (row, k+8..k+9) of x, zeros outside.
template <class T>
__device__ gpu::FragmentB x_at(const Linear& a, int64_t row, int64_t k, bool aligned) {
  gpu::FragmentB b = {};
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride + k;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t left = row < a.rows ? a.k - k - half * 8 : 0;
    if (left >= 2 && aligned) {
      b.word[half] = *reinterpret_cast<const uint32_t*>(x + half * 8);
    } else {
      if (left >= 1) b.word[half] = x[half * 8].bits;
      if (left >= 2) b.word[half] |= uint32_t{x[half * 8 + 1].bits} << 16;
    }
  }
  return b;
}

template <class T, int kTiles>  // of 8 rows
__global__ void __launch_bounds__(kFewThreads) few_rows_mma(Linear a, bool aligned) {
  auto& s = *gpu::shared<FewRowsShared<T>>();
  const int thread = static_cast<int>(threadIdx.x), lane = gpu::lane(), warp = gpu::warp();
  const int count = takes_two(a.epilogue) ? 2 : 1;
  const int64_t blocks = (a.k + kBlock - 1) / kBlock;
  // This warp's work, in order: blocks warp, warp + kFewWarps, ..., of one panel or two.
  const auto copy = [&](int64_t block, int half, int stage) {
    const int64_t first = block * kBlock, panel = int64_t{blockIdx.x} * count + half;
    const T* from = static_cast<const T*>(a.weight) + panel * a.k * kPanel;
#pragma unroll
    for (int i = lane; i < kBlock * 2; i += gpu::kWarp) {
      const bool in = first + i / 2 < a.k;
      gpu::copy16(half_of(s.weights[warp][stage], i / 2, i % 2),
                  in ? from + (first + i / 2) * kPanel + i % 2 * 8 : from, in);
    }
    gpu::commit_copies();
  };
  // This thread adds up output thread % 16 of row thread / 16.
  const int position = thread % kPanel, row = thread / kPanel;
  float totals[2] = {0.f, 0.f};
  int stage = 0;
  if (warp < blocks) copy(warp, 0, 0);
  for (int64_t round = 0; round < blocks; round += kFewWarps) {
    const int64_t block = round + warp;
    for (int half = 0; half < count && block < blocks; ++half, stage ^= 1) {
      const int64_t next = half + 1 < count ? block : block + kFewWarps;
      if (next < blocks) {
        copy(next, (half + 1) % count, stage ^ 1);
        gpu::wait_copies<1>();
      } else {
        gpu::wait_copies<0>();
      }
      gpu::sync_warp();
      gpu::FragmentC sums[kTiles] = {};
#pragma unroll 4
      for (int k = 0; k < kBlock; k += 16) {
        const gpu::FragmentA w = weights_at(s.weights[warp][stage], k);
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
          gpu::mma<T>(sums[r], w,
                      x_at<T>(a, r * 8 + lane / 4, block * kBlock + k + lane % 4 * 2, aligned));
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s.sums[warp][half][lane / 4 + i / 2 * 8][r * 8 + lane % 4 * 2 + i % 2] = sums[r].v[i];
      gpu::sync_warp();  // the stage has been read: the next copy may overwrite it
    }
    gpu::sync_block();
    if (row < kTiles * 8)
      for (int w = 0; w < kFewWarps && round + w < blocks; ++w)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (half < count) totals[half] += s.sums[w][half][position][row];
    gpu::sync_block();
  }
  const int64_t n = int64_t{blockIdx.x} * kPanel + output_at<T>(position);
  if (row < kTiles * 8 && row < a.rows && n < a.n) finish(a, row, n, totals[0], totals[1]);
}

// ---- many rows ----------------------------------------------------------------------------------

constexpr int kManyRows = 128, kStage = 32, kStages = 3;
constexpr int kXRow = kStage + 8;  // rows of a matrix lie in different banks

template <class T, int kPanels>
struct ManyRowsShared {
  alignas(16) T weights[kStages][kPanels][kStage * kPanel];
  alignas(16) T x[kStages][kManyRows][kXRow];
};

constexpr int kOutStride = kManyRows + 1;  // floats

template <class T, int kPanels>
constexpr size_t many_rows_bytes() {
  const size_t stages = sizeof(ManyRowsShared<T, kPanels>);
  const size_t out = sizeof(float) * kPanels * kPanel * kOutStride;
  return stages > out ? stages : out;
}

template <class T, int kPanels>  // two warps to every two panels
__global__ void __launch_bounds__(kPanels* gpu::kWarp)
    many_rows_mma(Linear a, int64_t panels_in_all, bool aligned) {
  constexpr int kThreads = kPanels * gpu::kWarp;
  auto& s = *gpu::shared<ManyRowsShared<T, kPanels>>();
  const int thread = static_cast<int>(threadIdx.x), lane = gpu::lane();
  const int my_panel = gpu::warp() / 2 * 2, my_row = gpu::warp() % 2 * 64;
  const int64_t row = int64_t{blockIdx.y} * kManyRows, panel = int64_t{blockIdx.x} * kPanels;
  const auto copy = [&](int64_t k, int stage) {
    for (int i = thread; i < kPanels * kStage * 2; i += kThreads) {
      const int p = i / (kStage * 2), at = i / 2 % kStage;
      const bool in = panel + p < panels_in_all && k + at < a.k;
      const T* w = static_cast<const T*>(a.weight);
      gpu::copy16(half_of(s.weights[stage][p], at, i % 2),
                  in ? w + ((panel + p) * a.k + k + at) * kPanel + i % 2 * 8 : w, in);
    }
    for (int i = thread; i < kManyRows * kStage / 8; i += kThreads) {
      const int r = i / (kStage / 8), at = i % (kStage / 8) * 8;
      const T* x = static_cast<const T*>(a.x);
      const bool in = row + r < a.rows && k + at < a.k;
      const T* from = in ? x + (row + r) * a.x_stride + k + at : x;
      if (aligned) {
        gpu::copy16(&s.x[stage][r][at], from, in);
      } else {
        for (int j = 0; j < 8; ++j) s.x[stage][r][at + j] = in && k + at + j < a.k ? from[j] : T{0};
      }
    }
    gpu::commit_copies();
  };
  gpu::FragmentC sums[2][8] = {}, totals[2][8] = {};
  for (int i = 0; i < kStages - 1; ++i) copy(i * kStage, i);
  int stage = 0;
  for (int64_t begin = 0; begin < a.k; begin += kStage) {
    gpu::wait_copies<kStages - 2>();
    gpu::sync_block();  // this stage is there, and the one before it has been read
    copy(begin + (kStages - 1) * kStage, (stage + kStages - 1) % kStages);
#pragma unroll
    for (int k = 0; k < kStage; k += 16) {
      gpu::FragmentA w[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) w[p] = weights_at(s.weights[stage][my_panel + p], k);
#pragma unroll
      for (int r = 0; r < 8; r += 2) {
        uint32_t x[4];
        const int matrix = lane / 8;
        gpu::load_matrices<false>(
            x, &s.x[stage][my_row + r * 8 + matrix / 2 * 8 + lane % 8][k + matrix % 2 * 8]);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          gpu::mma<T>(sums[p][r], w[p], {{x[0], x[1]}});
          gpu::mma<T>(sums[p][r + 1], w[p], {{x[2], x[3]}});
        }
      }
    }
    stage = (stage + 1) % kStages;
    if ((begin + kStage) % kBlock != 0 && begin + kStage < a.k) continue;
#pragma unroll
    for (int p = 0; p < 2; ++p)
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          totals[p][r].v[i] += sums[p][r].v[i];
          sums[p][r].v[i] = 0.f;
        }
  }
  // Rows of y are written by neighbouring threads, and a pair's gate and up meet.
  gpu::wait_copies<0>();
  gpu::sync_block();
  float(*out)[kOutStride] = reinterpret_cast<float(*)[kOutStride]>(&s);
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[(my_panel + p) * kPanel + output_at<T>(lane / 4 + i / 2 * 8)]
           [my_row + r * 8 + lane % 4 * 2 + i % 2] = totals[p][r].v[i];
  gpu::sync_block();
  const int count = takes_two(a.epilogue) ? 2 : 1, outputs = kPanels * kPanel / count;
  for (int i = thread; i < kManyRows * outputs; i += kThreads) {
    const int r = i / outputs, o = i % outputs;
    const int first = o / kPanel * count * kPanel + o % kPanel;
    const int64_t n = panel / count * kPanel + o;
    if (row + r < a.rows && n < a.n)
      finish(a, row + r, n, out[first][r], count == 2 ? out[first + kPanel][r] : 0.f);
  }
}

// ---- launching ----------------------------------------------------------------------------------

inline bool fits_tensor_cores(const Linear& a) {
  return a.x_type == a.weight_type && a.x_type != DType::f32 && is_aligned(a.weight, 16);
}

template <class T, int kPanels>
int launch_many_rows(const Linear& a, void* stream) {
  const bool aligned = is_aligned(a.x, 16) && a.x_stride % 8 == 0 && a.k % 8 == 0;
  return over_rows(a, kManyRows, [&](const Linear& part, unsigned row_tiles) {
    const dim3 grid(static_cast<unsigned>(ceil_div(panels(a), kPanels)), row_tiles);
    return gpu::launch(&many_rows_mma<T, kPanels>, grid, kPanels * gpu::kWarp,
                       many_rows_bytes<T, kPanels>(), stream, part, panels(a), aligned);
  });
}

template <class T>
int run_mma(const Linear& a, void* stream) {
  if (a.rows == 0 || a.n == 0) return 0;
  if (a.rows <= kMostFewRows) {
    const bool aligned = is_aligned(a.x, 4) && a.x_stride % 2 == 0;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.n, kPanel)));
    const auto kernel = a.rows <= 8 ? &few_rows_mma<T, 1> : &few_rows_mma<T, 2>;
    return gpu::launch(kernel, grid, kFewThreads, sizeof(FewRowsShared<T>), stream, a, aligned);
  }
  // The larger tile reads less from L2, where it still gives every multiprocessor work.
  constexpr int64_t kEnoughTiles = 132;
  const bool large = ceil_div(panels(a), 8) * ceil_div(a.rows, kManyRows) >= kEnoughTiles;
  return large ? launch_many_rows<T, 8>(a, stream) : launch_many_rows<T, 4>(a, stream);
}

inline int linear_mma(const Linear& a, void* stream) {
  return a.x_type == DType::bf16 ? run_mma<bf16>(a, stream) : run_mma<f16>(a, stream);
}

}  // namespace
}  // namespace effinfer
