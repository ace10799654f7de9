// linear over vec.h: one task. A few panels at a time walk down k together, block by block, each
// block against all rows; x lies ready in L2, the sums of those panels in L1.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/linear/strips.h"
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// Above this many rows it is cheaper to widen 16-bit weights once than in every tile.
constexpr int64_t kWidenRows = 4 * kTileRows;

EFFINFER_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A block of x in float32, rows kXStride apart: the tiles' addresses are then constants. Rows
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

// All rows against P panels, in tiles of nearly equal height that prefetch the weights that come
// next, `lines` per panel. Of float32 the first two prefetch them all; 16-bit weights are half as
// many lines and at most four tiles (kWidenRows), which take even shares.
template <int P, class W>
void sweep_rows(TileArgs<W> args, int64_t rows, int64_t lines) {
  constexpr int kLess = sizeof(W) == sizeof(float) ? kNever : kSeldom;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t height = rows / left;
    const bool often = kLess == kNever ? lines > 0 : tiles == 1;
    if (often)
      tile_of<kTileRows, P, kOften, W>(height, args);
    else
      tile_of<kTileRows, P, kLess, W>(height, args);
    const int64_t prefetched = args.terms / (often ? kOften : kUnroll);
    rows -= height;
    lines -= prefetched;
    args.x += height * kXStride;
    if (args.before.at != nullptr) args.before.at += height * args.before.row;
    args.after.at += height * args.after.row;
    args.ahead += prefetched * kLine;
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
    if (rows <= kTileRows) return strip_panels(args, panels, rows, wide);
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

// The first lines of a stream of weights: hardware prefetchers follow what is being read only.
template <class W>
void prefetch_start(const W* w) {
  const char* const start = reinterpret_cast<const char*>(w);
  EFFINFER_UNROLL
  for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(start + line * kLine, 0, 2);
}

// Terms begin to end of k, x's copied at a time, and where their blocks lie.
struct Stretch {
  int64_t begin, end;
  const float* x;
  int64_t block_stride;
};

// Panels p to p + width of a task walk down a stretch. Sums are held in `held`; those of the last
// block go to `out`.
template <class W>
void walk_down(const Linear& a, const LinearTask& t, const Stretch& s, int64_t p, int64_t width,
               const Place& held, const Place& out, float* wide) {
  const int64_t k = a.k;
  const W* const weight = static_cast<const W*>(a.weight) + t.panel * k * kPanel;
  const W* const following = p + width < t.panels ? weight + ((p + width) * k + s.begin) * kPanel
                                                  : weight + s.end * kPanel;
  TileArgs<W> args = {};
  args.panel_stride = k * kPanel;
  args.w = weight + (p * k + s.begin) * kPanel;
  args.x = s.x;
  args.before = args.after = held;
  if (s.begin == 0) args.before.at = nullptr;
  for (int64_t left = s.end - s.begin;;) {
    args.terms = least(kTerms, left);
    left -= args.terms;
    const W* const next = left > 0 ? args.w + args.terms * kPanel : following;
    args.ahead = reinterpret_cast<const char*>(next);
    if (left == 0) {
      args.after = out;
      for (int64_t i = 0; i < width; ++i) prefetch_start(following + i * args.panel_stride);
    }
    multiply<W>(args, width, t.rows, wide);
    if (left == 0) return;
    args.w = next;
    args.x += s.block_stride;
    args.before = held;
  }
}

template <class X, class W>
void run(const Linear& a, const LinearTask& t) {
  const int64_t k = a.k, part = t.rows * kPanel;
  const bool narrow = t.rows <= (sizeof(W) == sizeof(float) ? kTileRows : 2);
  const int64_t group = narrow ? kMaxGroup : takes_two(a.epilogue) ? 2 : kTilePanels;
  const bool plain = sizeof(X) == sizeof(float) && a.epilogue == Epilogue::none &&
                     a.bias == nullptr && a.residual == nullptr;
  const bool in_place = sizeof(X) == sizeof(float) && t.rows == 1;
  const X* const x = static_cast<const X*>(a.x) + t.row * a.x_stride;
  float* const copied = t.scratch;
  float* const wide = copied + t.rows * t.x_blocks * kXStride;
  float* const sums = wide + kTilePanels * kTerms * kPanel;

  Stretch s = {0, 0, copied, t.rows * kXStride};
  do {
    s.begin = s.end;
    s.end = least(s.begin + t.x_blocks * kTerms, k);
    if (in_place) {
      s.x = reinterpret_cast<const float*>(x) + s.begin;
      s.block_stride = kTerms;
    } else {
      for (int64_t at = s.begin, block = 0; at < s.end; at += kTerms, ++block)
        copy_rows(x + at, a.x_stride, t.rows, least(kTerms, s.end - at),
                  copied + block * s.block_stride);
    }
    const bool last = s.end == k, whole = last && s.begin == 0;
    for (int64_t p = 0; p < t.panels; p += group) {
      const int64_t width = least(group, t.panels - p);
      // Sums that wait for more of x have a place for every panel.
      const Place held = {sums + (whole ? 0 : p * part), kPanel, part};
      const int64_t n = (t.panel + p) * kPanel;
      const bool direct = plain && last && n + width * kPanel <= a.n;
      const Place out =
          direct ? Place{static_cast<float*>(a.y) + t.row * a.y_stride + n, a.y_stride, kPanel}
                 : held;
      walk_down<W>(a, t, s, p, width, held, out, wide);
      if (last && !direct) finish<X>(a, t, p, width, sums + (whole ? 0 : p * part));
    }
  } while (s.end < k);
}

void dispatch(const Linear& a, const LinearTask& t) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto w) { run<decltype(x), decltype(w)>(a, t); });
  });
}

}  // namespace
}  // namespace effinfer
