// One task with int8 activations: blocking and arithmetic that every instruction set shares. A file
// that includes it has defined before
//   - a struct F for each packed format: kUnitK, kUnitBytes, kStep and kCentre (a sum of values is
//     kStep times one of codes, less kCentre times the sum of x), kDirectRows (up to so many rows
//     codes are decoded in registers, for each use), Decoded (the form they have after decoding)
//     and, if kDecodes, decode(packed, units, decoded);
//   - dot<F, R>(w, x, x_stride, units, sums): sums [R, 16] += units of w times R rows of x, exact;
//   - kDirectRows, the most of any format, and kTileRows, the rows of the largest dot.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/lowbit_linear/group.h"

namespace effinfer {
namespace {

using namespace linear_layout;
using lowbit::kBlock;
using lowbit::kSideBySide;

constexpr int64_t kCacheLine = 64;

// dot for a run-time number of rows up to R: of a group's first block, when `sums` hold nothing
// yet, or up to its end, when they are used.
template <class F, int R, int kStep>
EFFINFER_INLINE void dot_rows(int64_t rows, const uint8_t* w, const int8_t* x, int64_t x_stride,
                              int64_t units, int32_t* sums, bool first, const GroupEnd* end) {
  if constexpr (R > 1) {
    if (rows < R) return dot_rows<F, R - 1, kStep>(rows, w, x, x_stride, units, sums, first, end);
  }
  if (first) {
    EFFINFER_UNROLL
    for (int i = 0; i < R * kVecs; ++i) store_sums(sums + i * kLanes, IVec{});
  }
  dot<F, R>(w, x, x_stride, units, sums);
  if (end != nullptr) end_rows<R, kStep>(*end, sums);
}

// Rows of x are pages apart, where no hardware prefetcher follows: without this a tile waits for L2
// as it begins each of its rows, and 512 rows on 4 bits take a tenth longer.
EFFINFER_INLINE void prefetch_rows(const int8_t* x, int64_t x_stride, int64_t rows, int64_t k) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    for (int64_t i = 0; i < k; i += kCacheLine) __builtin_prefetch(x + i);
  }
}

// All rows times one block of one panel. The end's rows move on from tile to tile; sums that end
// where they began are read no more, so that all tiles use the same.
template <class F>
void multiply_block(const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t k, int64_t rows,
                    uint8_t* decoded, int32_t* sums, bool first, GroupEnd* end) {
  const int64_t units = (k + F::kUnitK - 1) / F::kUnitK;
  using D = typename F::Decoded;
  if constexpr (F::kDirectRows > 0) {
    if (rows <= F::kDirectRows)
      return dot_rows<F, F::kDirectRows, F::kStep>(rows, w, x, x_stride, units, sums, first, end);
  }
  if constexpr (F::kDecodes) {
    F::decode(w, units, decoded);
    w = decoded;
  }
  const int64_t d_units = (k + D::kUnitK - 1) / D::kUnitK;
  // Tiles of nearly equal height.
  for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t height = rows / tiles;
    if (tiles > 1) prefetch_rows(x + height * x_stride, x_stride, height, k);
    dot_rows<D, kTileRows, F::kStep>(height, w, x, x_stride, d_units, sums, first, end);
    rows -= height;
    x += height * x_stride;
    if (!first || end == nullptr) sums += height * kPanel;
    if (end != nullptr) {
      end->x_sums += height * end->x_groups;
      end->totals += height * kPanel;
    }
  }
}

// rne(clamp(v * multiplier)) of [rows, 16] into y.
void requantize(const LowbitLinear& a, const float* values, int64_t row, int64_t rows, int64_t n,
                int64_t valid) {
  for (int64_t r = 0; r < rows; ++r, values += kPanel) {
    int8_t* const y = static_cast<int8_t*>(a.io.y) + (row + r) * a.io.y_stride + n;
    for (int64_t i = 0; i < valid; ++i) {
      const float v = values[i] * a.multiplier[n + i];
      const float least = v >= a.low ? v : a.low;
      y[i] = static_cast<int8_t>(__builtin_rintf(least <= a.high ? least : a.high));
    }
  }
}

// From totals [panels, rows, 16], before the rows' scales, to y.
void finish_panels(const LowbitLinear& a, const float* x_scale, const LinearTask& t, int64_t panel,
                   int64_t panels, float* totals) {
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t r = 0; r < t.rows; ++r) {
      float* const row = totals + (p * t.rows + r) * kPanel;
      EFFINFER_UNROLL
      for (int v = 0; v < kPanel; v += kLanes) store(row + v, load(row + v) * splat(x_scale[r]));
    }
  }
  if (a.multiplier == nullptr)
    return with_type(a.io.x_type,
                     [&](auto type) { finish<decltype(type)>(a.io, t, panel, panels, totals); });
  const int64_t step = takes_two(a.io.epilogue) ? 2 : 1;
  for (int64_t p = 0; p < panels; p += step, totals += step * t.rows * kPanel) {
    Finish<float> o = finish_of<float>(a.io, t, panel + p, totals);
    o.y = totals;
    o.y_stride = kPanel;
    finish_panel(a.io.epilogue, o);
    requantize(a, totals, t.row, t.rows, (t.panel + panel + p) / step * kPanel, o.valid);
  }
}

// A few panels walk down k together, block by block, so that as many streams of weights are read
// and a block of x serves them all; sums of a group that is longer than a block wait in `sums`.
template <class F>
void int8_task(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  constexpr int64_t kLongest = kBlock / F::kUnitK * F::kUnitK;
  const LowbitWeight& w = a.weight;
  const int64_t k = a.io.k, part = t.rows * kPanel;
  const int64_t side = t.rows <= kDirectRows ? kSideBySide : 2;
  float* const totals = t.scratch;
  auto* const sums = reinterpret_cast<int32_t*>(totals + kSideBySide * part);
  auto* const decoded = reinterpret_cast<uint8_t*>(sums + kSideBySide * part);
  const int8_t* const x = q.codes + t.row * q.stride;
  for (int64_t p = 0; p < t.panels; p += side) {
    const int64_t width = t.panels - p < side ? t.panels - p : side;
    memset(totals, 0, static_cast<size_t>(width * part) * sizeof(float));
    for (int64_t g = 0, begin = 0; begin < k;) {
      const int64_t group_end = (g + 1) * w.group < k ? (g + 1) * w.group : k;
      const int64_t end = begin + kLongest < group_end ? begin + kLongest : group_end;
      const bool first = begin == g * w.group, last = end == group_end;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t panel = t.panel + p + i;
        const uint8_t* const packed =
            w.packed + panel * w.panel_stride + begin / F::kUnitK * F::kUnitBytes;
        GroupEnd group;
        if (last) {
          group = load_group(w, panel, g, F::kCentre);
          group.x_sums = q.sums + t.row * q.groups + g;
          group.x_groups = q.groups;
          group.totals = totals + i * part;
        }
        multiply_block<F>(packed, x + begin, q.stride, end - begin, t.rows, decoded,
                          sums + (first && last ? 0 : i * part), first, last ? &group : nullptr);
      }
      begin = end;
      if (last) ++g;
    }
    finish_panels(a, q.scale + t.row, t, p, width, totals);
  }
}

}  // namespace
}  // namespace effinfer
