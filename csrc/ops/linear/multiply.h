// A block of panels times all rows of a task: which tiles, in what order, and what they prefetch.
#pragma once
#include "ops/linear/strips.h"
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// Above this many rows it is cheaper to widen 16-bit weights once than in every tile.
constexpr int64_t kWidenRows = 4 * kTileHeight;

template <class W>
void widen(const W* w, int64_t terms, float* out) {
  for (int64_t k = 0; k < terms; ++k) {
    Vec v[kPanelVecs];
    load_panel(w + k * kPanel, v);
    EFFINFER_UNROLL
    for (int i = 0; i < kPanelVecs; ++i) store(out + k * kPanel + i * kLanes, v[i]);
  }
}

// All rows against P panels, in tiles of nearly equal height that prefetch the weights that come
// next, `lines` per panel. Of float32 the first two prefetch them all; 16-bit weights are half as
// many lines and at most four tiles (kWidenRows), which take even shares.
template <int P, class W>
void sweep_rows(TileArgs<W> args, int64_t rows, int64_t lines) {
  constexpr int kLess = sizeof(W) == sizeof(float) ? kNever : kSeldom;
  const int64_t tiles = (rows + kTileHeight - 1) / kTileHeight;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t height = rows / left;
    const bool often = kLess == kNever ? lines > 0 : tiles == 1;
    if (often)
      tile_of<kTileHeight, P, kOften, W>(height, args);
    else
      tile_of<kTileHeight, P, kLess, W>(height, args);
    const int64_t prefetched = args.terms / (often ? kOften : kUnroll);
    rows -= height;
    lines -= prefetched;
    args.x += height * kXStride;
    if (args.before.at != nullptr) args.before.at += height * args.before.row;
    args.after.at += height * args.after.row;
    args.ahead += prefetched * kLine;
  }
}

// Two tiles of rows against kMaxGroup panels of float32 that walk down k together. Both prefetch
// the group's next block, a line of each panel in turn: the memory sees kMaxGroup streams, and
// brings 19 GB/s where one brings 17. As many misses as a core can have are then under way; only
// loads that the hardware prefetches for, which arithmetic of this density holds up, get more.
template <class W>
void sweep_group(TileArgs<W> args, int64_t rows) {
  const int64_t heights[] = {rows / 2, rows - rows / 2};
  const char* ahead = args.ahead;
  for (int64_t p = 0; p < kMaxGroup; ++p) {
    TileArgs<W> part = args;
    for (const int64_t height : heights) {
      part.ahead = ahead;
      tile_of<kTileHeight, 1, kInTurns, W>(height, part);
      ahead += part.terms / kRound * kLine;
      part.x += height * kXStride;
      if (part.before.at != nullptr) part.before.at += height * part.before.row;
      part.after.at += height * part.after.row;
    }
    args.w += args.panel_stride;
    if (args.before.at != nullptr) args.before.at += args.before.panel;
    args.after.at += args.after.panel;
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
  const TileArgs<float> widened = {args.terms,  wide,       kTerms * kPanel, args.x,
                                   args.before, args.after, args.ahead};
  sweep_rows<P, float>(widened, rows, lines);
}

// One or two rows: bound by the weights' bytes, so several panels are streamed side by side; that
// the hardware prefetches best.
template <int R, int P, class W>
void stream_panels(TileArgs<W> args, int64_t panels) {
  for (; panels >= P; panels -= P) {
    tile<R, P, kNever, W>(args);
    args.w += P * args.panel_stride;
    if (args.before.at != nullptr) args.before.at += P * args.before.panel;
    args.after.at += P * args.after.panel;
  }
  if constexpr (P > 1) stream_panels<R, 1, W>(args, panels);
}

// `panels` panels times all rows.
template <class W>
void multiply(TileArgs<W> args, int64_t panels, int64_t rows, float* wide) {
  if (rows == 1) return stream_panels<1, kMaxGroup, W>(args, panels);
  if constexpr (sizeof(W) == sizeof(float)) {
    if (in_strips<W>(rows)) return strip_panels(args, panels, rows, wide);
    if constexpr (kTilePanels == 1) {
      if (in_turns<W>(rows) && panels == kMaxGroup) return sweep_group(args, rows);
    }
  }
  if (rows == 2) return stream_panels<2, 2, W>(args, panels);
  for (; panels > 0; panels -= kTilePanels) {
    // A panel by itself is multiplied twice over, to the same place.
    if (panels < kTilePanels) args.panel_stride = args.before.panel = args.after.panel = 0;
    panels_times_rows<kTilePanels, W>(args, rows, wide);
    args.w += kTilePanels * args.panel_stride;
    args.ahead += kTilePanels * args.panel_stride * static_cast<int64_t>(sizeof(W));
    if (args.before.at != nullptr) args.before.at += kTilePanels * args.before.panel;
    args.after.at += kTilePanels * args.after.panel;
  }
}

}  // namespace
}  // namespace effinfer
