// Up to 16 rows: the weights' bytes set the pace. A block has two panels; its warps take segments
// of k in turn and leave their sums in shared memory, where a thread per output adds them up in
// order, a round of kSlots segments at a time.
#pragma once
#include "ops/lowbit_linear/cuda_mma.h"

namespace effinfer::lowbit {
namespace {

constexpr int kFewThreads = 512, kFewWarps = kFewThreads / gpu::kWarp;
constexpr int kSlots = 32;
constexpr int kOutputs = 2 * kPanel;  // of a block

template <class Number, int kTiles>  // of 8 rows
struct FewRowsShared {
  Number sums[kSlots][kTiles * 8][kOutputs + 1];
};

template <class A, LowbitFormat F, int kTiles>
__global__ void __launch_bounds__(kFewThreads) few_rows(Problem p) {
  using Number = typename A::Number;
  static_assert(kTiles * 8 * kOutputs <= kFewThreads);
  auto& shared = *gpu::shared<FewRowsShared<Number, kTiles>>();
  const int thread = static_cast<int>(threadIdx.x), lane = gpu::lane();
  const int g = lane / 4, t = lane % 4, first = g % 4 * 4;
  const auto panel_of = [&](int half) {  // an odd last panel stands in for the one it lacks
    const int64_t panel = int64_t{blockIdx.x} * 2 + half;
    return panel < p.panels ? panel : p.panels - 1;
  };
  const int64_t panel = panel_of(g / 4);
  const uint8_t* const units = p.args.weight.packed + panel * p.args.weight.panel_stride;
  // This thread adds up output `output` of row `row`.
  const int output = thread % kOutputs, row = thread / kOutputs;
  const int64_t output_panel = panel_of(output / kPanel);
  float total = 0.f;
  Number sum = 0;
  for (int round = 0; round < p.segments; round += kSlots) {
    const int count = p.segments - round < kSlots ? p.segments - round : kSlots;
    for (int s = gpu::warp(); s < count; s += kFewWarps) {
      const Segment at = p.segment(round + s);
      uint32_t minus_zero[4];
      minus_zeros<A, F>(p, panel, at.group, first, minus_zero);
      typename A::Sum sums[kTiles][2] = {};
#pragma unroll 4
      for (int step = at.begin; step < at.end; step += kStep) {
        const int k = k_of<F>(step, t);
        typename A::Weights w[2];
        both_weights<A, F>(quads_at<F>(units, k, p.units - 1, first), minus_zero, w);
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          const typename A::X x = A::x_at(p, r * 8 + g, k);
#pragma unroll
          for (int i = 0; i < 2; ++i) A::multiply(sums[r][i], w[i], x);
        }
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          shared.sums[s][r * 8 + 2 * t + i % 2][4 * g + i / 2] = sums[r][i / 4].v[i % 4];
    }
    gpu::sync_block();
    if (row < kTiles * 8) {
#pragma unroll 4
      for (int s = 0; s < count; ++s) {
        const int64_t group = (round + s) / p.pieces;
        sum += shared.sums[s][row][output];
        if (A::kWholeGroups && (round + s + 1) % p.pieces != 0) continue;
        const Affine affine(p.args.weight, output_panel, group, output % kPanel);
        const int64_t section = A::kWholeGroups ? group : round + s;
        total = affine.add<A>(total, sum, sum_of_x<A>(p, section, row));
        sum = 0;
      }
    }
    gpu::sync_block();
  }
  const float up = gpu::shuffle(total, (lane + kPanel) % gpu::kWarp);
  const bool gated = takes_two(p.args.io.epilogue);
  const int64_t n = int64_t{blockIdx.x} * (gated ? kPanel : kOutputs) + output;
  if (row < p.args.io.rows && row < kTiles * 8 && n < p.args.io.n && (!gated || output < kPanel))
    finish(p, row, n, total, up);
}

template <class A, LowbitFormat F>
int launch_few_rows(const Problem& p, void* stream) {
  using Number = typename A::Number;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.panels, 2)));
  if (p.args.io.rows <= 8)
    return gpu::launch(&few_rows<A, F, 1>, grid, kFewThreads, sizeof(FewRowsShared<Number, 1>),
                       stream, p);
  return gpu::launch(&few_rows<A, F, 2>, grid, kFewThreads, sizeof(FewRowsShared<Number, 2>),
                     stream, p);
}

}  // namespace
}  // namespace effinfer::lowbit
