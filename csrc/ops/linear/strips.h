// A few rows on float32 weights: bound by the weights' bytes, like one row, but too many for
// several panels of sums in registers. One panel after the other is one stream, 17 GB/s where four
// read 24, with or without software prefetch; so panels advance in turns, a strip of k each, and
// the hardware prefetches them all. More than one tile of rows computes for longer than it waits,
// and so does widening: there this is no faster. Included by generic.h only.
#pragma once
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

// Terms of a panel before the next one's turn. Short turns keep all prefetchers going; beginning
// one costs as much as a few terms do, which with more rows counts for more than the bytes.
constexpr int64_t turn(int64_t rows) { return rows <= 4 ? 8 : 16; }

using Strip = void (*)(const float* w, const float* x, int64_t terms, float* sums);

// sums [R, 16] += R rows of x times a strip of a panel.
template <int R>
__attribute__((noinline)) void strip(const float* w, const float* x, int64_t terms, float* sums) {
  Vec sum[R][kPanelVecs];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int v = 0; v < kPanelVecs; ++v) sum[r][v] = load(sums + r * kPanel + v * kLanes);
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec b[kPanelVecs];
    load_panel(w + k * kPanel, b);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      const Element a = element(x[r * kXStride + k]);
      EFFINFER_UNROLL
      for (int v = 0; v < kPanelVecs; ++v) accumulate(sum[r][v], a, b[v]);
    }
  };
  for (; terms >= 4; terms -= 4) {
    EFFINFER_UNROLL
    for (int64_t k = 0; k < 4; ++k) step(k);
    w += 4 * kPanel;
    x += 4;
  }
  for (; terms > 0; --terms) {
    step(0);
    w += kPanel;
    x += 1;
  }
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int v = 0; v < kPanelVecs; ++v) store(sums + r * kPanel + v * kLanes, sum[r][v]);
  }
}

template <int R>
Strip strip_of(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strip_of<R - 1>(rows);
  }
  return strip<R>;
}

// args.after = args.before + sums [panels, rows, 16]
void add_sums(const TileArgs<float>& args, int64_t panels, int64_t rows, const float* sums) {
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
      const float* const before = args.before.at + r * args.before.row + p * args.before.panel;
      float* const after = args.after.at + r * args.after.row + p * args.after.panel;
      EFFINFER_UNROLL
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const Vec sum = load(sums + v);
        store(after + v, args.before.at != nullptr ? load(before + v) + sum : sum);
      }
    }
  }
}

// All rows, at most kTileHeight, against panels side by side; `sums` is room for [panels, rows,
// 16].
void strip_panels(const TileArgs<float>& args, int64_t panels, int64_t rows, float* sums) {
  const Strip multiply = strip_of<kTileHeight>(rows);
  memset(sums, 0, static_cast<size_t>(panels * rows * kPanel) * sizeof(float));
  const int64_t step = turn(rows);
  for (int64_t k = 0; k < args.terms; k += step) {
    const int64_t terms = args.terms - k < step ? args.terms - k : step;
    for (int64_t p = 0; p < panels; ++p)
      multiply(args.w + p * args.panel_stride + k * kPanel, args.x + k, terms,
               sums + p * rows * kPanel);
  }
  add_sums(args, panels, rows, sums);
}

}  // namespace
}  // namespace effinfer
