// One task, whatever its weights are: x copied to where the tiles read it, panels walked group by
// group, sums held until k ends and turned into y.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/linear/tile.h"

namespace effinfer {
namespace {

using namespace linear_layout;

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

// Terms begin to end of k, x's copied at a time, and where their blocks lie.
struct Stretch {
  int64_t begin, end;
  const float* x;
  int64_t block_stride;
};

// The panels of a task, `group` at a time, over x copied to float32: walk(stretch, p, width, held,
// out, wide) multiplies panels p to p + width, with kWide floats at `wide`.
template <class X, class Walk>
void run_panels(const Linear& a, const LinearTask& t, int64_t group, Walk&& walk) {
  const int64_t k = a.k, part = t.rows * kPanel;
  const bool plain = sizeof(X) == sizeof(float) && a.epilogue == Epilogue::none &&
                     a.bias == nullptr && a.residual == nullptr;
  const bool in_place = sizeof(X) == sizeof(float) && t.rows == 1;
  const X* const x = static_cast<const X*>(a.x) + t.row * a.x_stride;
  float* const copied = t.scratch;
  float* const wide = copied + t.rows * t.x_blocks * kXStride;
  float* const sums = wide + kWide;

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
      walk(s, p, width, held, out, wide);
      if (last && !direct) finish<X>(a, t, p, width, sums + (whole ? 0 : p * part));
    }
  } while (s.end < k);
}

}  // namespace
}  // namespace effinfer
