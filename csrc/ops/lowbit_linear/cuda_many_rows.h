// More rows: tiles of 64 outputs x 128 rows, a warp 32 x 64 of them. Packed weights and x pass
// through shared memory, three stages of kStage k; a warp unpacks its weights into registers, 16
// of a thread's for 16 products.
#pragma once
#include "ops/lowbit_linear/cuda_mma.h"

namespace effinfer::lowbit {
namespace {

constexpr int kManyThreads = 128, kManyRows = 128, kManyPanels = 4, kStages = 3;
constexpr int kWarpRows = 64, kRowTiles = kWarpRows / 8;

template <LowbitFormat F>
constexpr int kStage = F == LowbitFormat::ternary_dense ? 48 : 64;  // whole units

template <class A, LowbitFormat F>
struct ManyRowsShared {
  static constexpr int kUnits = kStage<F> / layout(F).unit_k;
  static constexpr int kPanelBytes = kUnits * layout(F).unit_bytes;
  static constexpr int kRowBytes = 64 * A::kBytes + 16 * A::kBytes;  // 8 rows in different banks
  alignas(16) uint8_t weights[kStages][kManyPanels][kPanelBytes];
  alignas(16) uint8_t x[kStages][kManyRows][kRowBytes];
};

constexpr int kOutStride = kManyRows + 1;  // floats

template <class A, LowbitFormat F>
constexpr size_t many_rows_bytes() {
  const size_t stages = sizeof(ManyRowsShared<A, F>);
  const size_t out = sizeof(float) * kManyPanels * kPanel * kOutStride;
  return stages > out ? stages : out;
}

template <class A, LowbitFormat F>
__device__ void copy_stage(const Problem& p, ManyRowsShared<A, F>& shared, int stage, int64_t panel,
                           int64_t row, int k) {
  using Shared = ManyRowsShared<A, F>;
  const int thread = static_cast<int>(threadIdx.x);
  const LowbitWeight& w = p.args.weight;
  const int64_t valid = int64_t{p.units} * layout(F).unit_bytes;
  const int64_t from = int64_t{k / layout(F).unit_k} * layout(F).unit_bytes;
  for (int i = thread; i < kManyPanels * Shared::kPanelBytes / 16; i += kManyThreads) {
    const int of = i / (Shared::kPanelBytes / 16), at = i % (Shared::kPanelBytes / 16) * 16;
    const bool in = panel + of < p.panels && from + at < valid;
    gpu::copy16(&shared.weights[stage][of][at],
                in ? w.packed + (panel + of) * w.panel_stride + from + at : w.packed, in);
  }
  constexpr int kPieces = kStage<F> * A::kBytes / 16;
  for (int i = thread; i < kManyRows * kPieces; i += kManyThreads) {
    const int r = i / kPieces, at = i % kPieces * 16;
    A::copy_x(&shared.x[stage][r][at], p, row + r, k + at / A::kBytes);
  }
  gpu::commit_copies();
}

template <class A, LowbitFormat F>
__global__ void __launch_bounds__(kManyThreads) many_rows(Problem p) {
  auto& shared = *gpu::shared<ManyRowsShared<A, F>>();
  const int thread = static_cast<int>(threadIdx.x), lane = gpu::lane();
  const int g = lane / 4, t = lane % 4, first = g % 4 * 4;
  const int my_half = gpu::warp() % 2 * 2 + g / 4, my_row = gpu::warp() / 2 * kWarpRows;
  const int64_t row = int64_t{blockIdx.y} * kManyRows, panel = int64_t{blockIdx.x} * kManyPanels;
  const int64_t my_panel = panel + my_half < p.panels ? panel + my_half : p.panels - 1;

  typename A::Sum sums[kRowTiles][2] = {};
  float totals[kRowTiles][8] = {};
  int s = 0;
  Segment at = p.segment(0);
  uint32_t minus_zero[4];
  minus_zeros<A, F>(p, my_panel, at.group, first, minus_zero);
  const auto end_segment = [&] {
    if (!A::kWholeGroups || (s + 1) % p.pieces == 0) {
      const Affine affine[4] = {{p.args.weight, my_panel, at.group, first},
                                {p.args.weight, my_panel, at.group, first + 1},
                                {p.args.weight, my_panel, at.group, first + 2},
                                {p.args.weight, my_panel, at.group, first + 3}};
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int64_t x_row = row + my_row + r * 8 + 2 * t + i % 2;
          const auto x_sum = sum_of_x<A>(p, A::kWholeGroups ? at.group : s, x_row);
          totals[r][i] =
              affine[i / 2].template add<A>(totals[r][i], sums[r][i / 4].v[i % 4], x_sum);
          sums[r][i / 4].v[i % 4] = 0;
        }
    }
    if (++s == p.segments) return;
    at = p.segment(s);
    minus_zeros<A, F>(p, my_panel, at.group, first, minus_zero);
  };

  for (int i = 0; i < kStages - 1; ++i) copy_stage<A, F>(p, shared, i, panel, row, i * kStage<F>);
  int stage = 0;
  for (int begin = 0; begin < p.k_end; begin += kStage<F>) {
    gpu::wait_copies<kStages - 2>();
    gpu::sync_block();  // this stage is there, and the one before it has been read
    copy_stage<A, F>(p, shared, (stage + kStages - 1) % kStages, panel, row,
                     begin + (kStages - 1) * kStage<F>);
    const uint8_t* const units = shared.weights[stage][my_half];
    for (int step = 0; step < kStage<F> && begin + step < p.k_end; step += kStep) {
      const int k = k_of<F>(step, t);
      typename A::Weights w[2];
      both_weights<A, F>(quads_at<F>(units, k, ManyRowsShared<A, F>::kUnits, first), minus_zero, w);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const typename A::X x = A::x_at(shared.x[stage][my_row + r * 8 + g], k);
#pragma unroll
        for (int i = 0; i < 2; ++i) A::multiply(sums[r][i], w[i], x);
      }
      while (s < p.segments && begin + step + kStep >= at.end) end_segment();
    }
    stage = (stage + 1) % kStages;
  }

  // Rows of y are written by neighbouring threads, and a pair's gate and up meet.
  gpu::wait_copies<0>();
  gpu::sync_block();
  float(*out)[kOutStride] = reinterpret_cast<float(*)[kOutStride]>(&shared);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out[my_half * kPanel + first + i / 2][my_row + r * 8 + 2 * t + i % 2] = totals[r][i];
  gpu::sync_block();
  const Linear& io = p.args.io;
  const int count = takes_two(io.epilogue) ? 2 : 1, outputs = kManyPanels * kPanel / count;
  for (int i = thread; i < kManyRows * outputs; i += kManyThreads) {
    const int r = i / outputs, o = i % outputs;
    const int gate = o / kPanel * count * kPanel + o % kPanel;
    const int64_t n = panel / count * kPanel + o;
    if (row + r < io.rows && n < io.n)
      finish(p, row + r, n, out[gate][r], count == 2 ? out[gate + kPanel][r] : 0.f);
  }
}

template <class A, LowbitFormat F>
int launch_many_rows(const Problem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.panels, kManyPanels)),
                  static_cast<unsigned>(ceil_div(p.args.io.rows, kManyRows)));
  return gpu::launch(&many_rows<A, F>, grid, kManyThreads, many_rows_bytes<A, F>(), stream, p);
}

}  // namespace
}  // namespace effinfer::lowbit
