// linear over vec.h: one task, block of k by block of k.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// Above this many rows it is cheaper to widen 16-bit weights once than in every tile.
constexpr int64_t kWidenRows = 4 * kTileRows;

// This block of x, in float32, rows kXStride apart: the tiles' addresses are then constants. Rows
// are short pieces far apart, which no hardware prefetcher follows.
template <class X>
void copy_rows(const X* x, int64_t stride, int64_t rows, int64_t terms, float* out) {
  constexpr int64_t kStep = 16, kRowsAhead = 4;
  for (int64_t r = 0; r < rows; ++r, x += stride, out += kXStride) {
    int64_t i = 0;
    for (; i + kStep <= terms; i += kStep) {
      if (r + kRowsAhead < rows) __builtin_prefetch(x + kRowsAhead * stride + i);
      EFFINFER_UNROLL
      for (int64_t v = 0; v < kStep; v += kLanes) store(out + i + v, load(x + i + v));
    }
    for (; i < terms; ++i) out[i] = load1(x + i);
  }
}

template <class W>
void widen(const W* w, int64_t terms, float* out) {
  for (int64_t k = 0; k < terms; ++k) {
    Vec v[kPanelVecs];
    load_panel(w + k * kPanel, v);
    EFFINFER_UNROLL
    for (int i = 0; i < kPanelVecs; ++i) store(out + k * kPanel + i * kLanes, v[i]);
  }
}

// One or two rows: bound by the weights' bytes, so several panels are streamed at once.
template <int R, int P, class W>
void stream_panels(TileArgs<W> args, int64_t panels) {
  for (; panels >= P; panels -= P) {
    tile<R, P, W>(args);
    args.w += P * args.panel_stride;
    args.sums += P * kPanel;
  }
  for (; panels > 0; --panels) {
    tile<R, 1, W>(args);
    args.w += args.panel_stride;
    args.sums += kPanel;
  }
}

// All rows against P panels, in tiles of nearly equal height. Each tile prefetches a part of the
// weights that come next, `lines` per panel.
template <int P, class W>
void sweep_rows(TileArgs<W> args, int64_t rows, int64_t lines) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t wanted = 4 * lines / (tiles * args.terms);
  args.ahead_lines = wanted >= 4 ? 4 : wanted >= 2 || (tiles == 3 && lines == args.terms) ? 2 : 1;
  const int64_t share = args.terms / 4 * args.ahead_lines;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t height = rows / left;
    if (lines <= 0) args.ahead_lines = 0;
    tile_of<kTileRows, P, W>(height, args);
    rows -= height;
    lines -= share;
    args.x += height * kXStride;
    args.sums += height * args.sums_stride;
    args.ahead += share * kLine;
  }
}

template <int P, class W>
void panels_times_rows(TileArgs<W> args, int64_t rows, float* wide) {
  const int64_t lines = args.terms * kPanel * static_cast<int64_t>(sizeof(W)) / kLine;
  if (sizeof(W) == sizeof(float) || rows <= kWidenRows) {
    sweep_rows<P, W>(args, rows, lines);
    return;
  }
  EFFINFER_UNROLL
  for (int p = 0; p < P; ++p)
    widen(args.w + p * args.panel_stride, args.terms, wide + p * kTerms * kPanel);
  const TileArgs<float> widened = {args.terms,       wide,       kTerms * kPanel, args.x, args.sums,
                                   args.sums_stride, args.first, args.ahead,      0};
  sweep_rows<P, float>(widened, rows, lines);
}

template <class X, class W>
void run(const Linear& a, const LinearTask& t) {
  const int64_t k = a.k, columns = t.panels * kPanel;
  float* const x = t.scratch;
  float* const sums = x + t.rows * kXStride;
  float* const wide = sums + t.rows * columns;
  const X* const rows = static_cast<const X*>(a.x) + t.row * a.x_stride;
  const W* const weight = static_cast<const W*>(a.weight) + t.panel * k * kPanel;
  if (k <= 0) memset(sums, 0, static_cast<size_t>(t.rows * columns) * sizeof(float));

  for (int64_t begin = 0; begin < k; begin += kTerms) {
    const int64_t terms = k - begin < kTerms ? k - begin : kTerms;
    copy_rows(rows + begin, a.x_stride, t.rows, terms, x);
    TileArgs<W> args = {
        terms, weight + begin * kPanel, k * kPanel, x, sums, columns, begin == 0, nullptr, 0};
    if (t.rows == 1) {
      stream_panels<1, 4, W>(args, t.panels);
      continue;
    }
    if (t.rows == 2) {
      stream_panels<2, 2, W>(args, t.panels);
      continue;
    }
    for (int64_t p = 0; p < t.panels;) {
      const bool full = t.panels - p >= kTilePanels;
      const int64_t width = full ? kTilePanels : 1;
      const W* w = args.w + p * args.panel_stride;
      TileArgs<W> here = args;
      here.w = w;
      here.sums = sums + p * kPanel;
      // Next comes the following panel, and after the last one the first panel's next block.
      here.ahead = reinterpret_cast<const char*>(p + width < t.panels ? w + width * k * kPanel
                                                                      : args.w + terms * kPanel);
      if (full)
        panels_times_rows<kTilePanels, W>(here, t.rows, wide);
      else
        panels_times_rows<1, W>(here, t.rows, wide);
      p += width;
    }
  }
  finish<X>(a, t, sums);
}

void dispatch(const Linear& a, const LinearTask& t) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto w) { run<decltype(x), decltype(w)>(a, t); });
  });
}

}  // namespace
}  // namespace effinfer
