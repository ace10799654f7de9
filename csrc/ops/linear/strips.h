// A few rows on float32 weights: bound by the weights' bytes, like one row, but too many for
// several panels of sums in registers. One panel after the other is one stream, 17 GB/s where four
// read 24, with or without software prefetch; so kMaxGroup panels advance in turns, a strip of k
// each. Up to kUnaided rows the hardware prefetches them all. With more, products between two lines
// take so long that its prefetchers fall asleep (10 GB/s): a strip then asks for the next turn's
// lines itself. More than kStripRows compute for longer than they wait, and so does widening: there
// this is no faster. Included by generic.h only.
#pragma once
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

constexpr int64_t kUnaided = 4, kStripRows = kTilePanels == 1 ? 8 : kTileHeight;
constexpr int64_t kStripTiles = 2;

template <class W>
constexpr bool in_strips(int64_t rows) {
  return sizeof(W) == sizeof(float) && rows > 1 && rows <= kStripRows;
}

// Whether the strips of so many rows and panels prefetch the weights of the next ones.
template <class W>
constexpr bool strips_prefetch(int64_t rows, int64_t panels) {
  return kTilePanels == 1 && in_strips<W>(rows) && rows > kUnaided && panels == kMaxGroup;
}

// Terms of a panel before the next one's turn. Short turns keep all prefetchers going; beginning
// one costs as much as a few terms do, which with more rows counts for more than the bytes. Where
// strips prefetch, turns may be long; what they fetch is used next, from L1.
constexpr int64_t strip_turn(int64_t rows, bool prefetch) {
  return prefetch ? 64 : rows <= kUnaided ? 8 : 16;
}

// w: a panel's strip, times rows of x, added to sums; `ahead`: what is prefetched meanwhile. All in
// registers: gathered in a struct, they would keep one strip from beginning before the last ends.
using Strip = void (*)(const float* w, const float* x, int64_t terms, float* sums,
                       const char* ahead, int64_t ahead_stride);

// sums [R, 16] += R rows of x times a strip of a panel. Every kBurst terms (0: never) one line of
// each panel is prefetched: four misses in a burst bring 5 % more than the same ones spread out,
// lines of one panel far less.
template <int R, int kBurst>
__attribute__((noinline)) void strip(const float* w, const float* x, int64_t terms, float* sums,
                                     [[maybe_unused]] const char* ahead,
                                     [[maybe_unused]] int64_t ahead_stride) {
  constexpr int64_t kTermsAtOnce = kBurst > 0 ? kBurst : kUnroll;
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
  for (; terms >= kTermsAtOnce; terms -= kTermsAtOnce) {
    if constexpr (kBurst > 0) {
      EFFINFER_UNROLL
      for (int64_t p = 0; p < kMaxGroup; ++p) __builtin_prefetch(ahead + p * ahead_stride);
      ahead += kLine;
    }
    EFFINFER_UNROLL
    for (int64_t k = 0; k < kTermsAtOnce; ++k) step(k);
    w += kTermsAtOnce * kPanel;
    x += kTermsAtOnce;
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

// The strip of a run-time number of rows, at most R.
template <int R, int kBurst>
Strip strip_of(int64_t rows) {
  if constexpr (R > 1) {
    if (rows < R) return strip_of<R - 1, kBurst>(rows);
  }
  return strip<R, kBurst>;
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

// A tile of rows, and how it goes through a strip.
struct StripTile {
  Strip multiply;
  int64_t rows, bursts;  // bursts of prefetches in a whole turn
};

// One or two tiles, of nearly equal height, that prefetch `lines` of each panel, or none, in a turn
// of kMaxGroup panels.
int64_t strip_tiles(int64_t rows, int64_t lines, StripTile* tiles) {
  const int64_t count = (rows + kTileHeight - 1) / kTileHeight;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t height = rows / (count - i);
    rows -= height;
    if (lines == 0)
      tiles[i] = {strip_of<kTileHeight, 0>(height), height, 0};
    else if (count == 1)
      tiles[i] = {strip_of<kTileHeight, kMaxGroup>(height), height, lines / kMaxGroup};
    else
      tiles[i] = {strip_of<kTileHeight, 2 * kMaxGroup>(height), height, lines / kMaxGroup / 2};
  }
  return count;
}

// Panels side by side times kTiles tiles of rows, `turn` terms of each panel in turn.
template <int kTiles>
void take_turns(const TileArgs<float>& args, int64_t panels, int64_t turn, const StripTile* tiles,
                float* sums) {
  const int64_t stride = args.panel_stride;
  for (int64_t k = 0; k < args.terms; k += turn) {
    const int64_t terms = args.terms - k < turn ? args.terms - k : turn;
    const float* w = args.w + k * kPanel;
    const char* ahead =
        k + turn < args.terms ? reinterpret_cast<const char*>(w + turn * kPanel) : args.ahead;
    float* part = sums;
    for (int64_t p = 0; p < panels; ++p, w += stride) {
      const float* x = args.x + k;
      EFFINFER_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        tiles[i].multiply(w, x, terms, part, ahead, stride * static_cast<int64_t>(sizeof(float)));
        x += tiles[i].rows * kXStride;
        part += tiles[i].rows * kPanel;
        ahead += tiles[i].bursts * kLine;
      }
    }
  }
}

// All rows against panels side by side; `sums` is room for [panels, rows, 16].
void strip_panels(const TileArgs<float>& args, int64_t panels, int64_t rows, float* sums) {
  const bool prefetch = strips_prefetch<float>(rows, panels);
  const int64_t turn = strip_turn(rows, prefetch);
  StripTile tiles[kStripTiles];
  const int64_t count = strip_tiles(rows, prefetch ? turn : 0, tiles);
  memset(sums, 0, static_cast<size_t>(panels * rows * kPanel) * sizeof(float));
  if (count == 1)
    take_turns<1>(args, panels, turn, tiles, sums);
  else
    take_turns<2>(args, panels, turn, tiles, sums);
  add_sums(args, panels, rows, sums);
}

}  // namespace
}  // namespace effinfer
