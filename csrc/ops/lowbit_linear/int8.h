// One task with int8 activations: blocking and arithmetic that every instruction set shares. A file
// that includes it has defined before
//   - a struct F for each packed format: kUnitK, kUnitBytes, kStep and kCentre (a sum of values is
//     kStep times one of codes, less kCentre times the sum of x), kDirectRows (up to so many rows
//     codes are decoded in registers, for each use), Decoded (the form they have after decoding)
//     and, if kDecodes, decode(packed, units, decoded);
//   - dot<F, R>(w, x, x_stride, units, sink): exact sums of units of w times R rows of x, for sink;
//   - kDirectRows, the most of any format, and kTileRows, the rows of the largest dot.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/lowbit_linear/group.h"

namespace effinfer {
namespace {

using namespace linear_layout;
using lowbit::kBlock;
using lowbit::kSideBySide;
using lowbit::kSpan;

constexpr int64_t kCacheLine = 64;

// dot for a run-time number of rows up to R.
template <class F, int R>
EFFINFER_INLINE void dot_rows(int64_t rows, const uint8_t* w, const int8_t* x, int64_t x_stride,
                              int64_t units, const Sink& sink) {
  if constexpr (R > 1) {
    if (rows < R) return dot_rows<F, R - 1>(rows, w, x, x_stride, units, sink);
  }
  dot<F, R>(w, x, x_stride, units, sink);
}

// Rows of x are pages apart, where no hardware prefetcher follows: without this a tile waits for L2
// as it begins each of its rows, and 512 rows on 4 bits take a tenth longer.
EFFINFER_INLINE void prefetch_rows(const int8_t* x, int64_t x_stride, int64_t rows, int64_t k) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride) {
    for (int64_t i = 0; i < k; i += kCacheLine) __builtin_prefetch(x + i);
  }
}

// How many k of [begin, end) may be added up in 16 bits, for every row of a task: all, spans of k
// at a time, or 0 where x is too large for that.
int64_t run_k(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t, int64_t begin,
              int64_t end) {
  if (q.reach == nullptr) return 0;
  const int most = 32767 / lowbit::layout(a.weight.format).max_code;
  const int64_t first = begin / kSpan, spans = (end - 1) / kSpan + 1 - first;
  const uint16_t* const reach = q.reach + first * a.io.rows + t.row;
  int together = 0, largest = 0;
  for (int64_t r = 0; r < t.rows; ++r) {
    int sum = 0;
    for (int64_t s = 0; s < spans; ++s) {
      const int one = reach[s * a.io.rows + r];
      sum += one;
      largest = one > largest ? one : largest;
    }
    together = sum > together ? sum : together;
  }
  if (together <= most) return end - begin;
  return begin % kSpan == 0 && largest <= most ? kSpan : 0;
}

// All rows times one block of one panel; where sums go moves on from tile to tile.
template <class F>
void multiply_block(const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t k, int64_t rows,
                    uint8_t* decoded, Sink sink) {
  const int64_t units = (k + F::kUnitK - 1) / F::kUnitK;
  using D = typename F::Decoded;
  if constexpr (F::kDirectRows > 0) {
    if (rows <= F::kDirectRows)
      return dot_rows<F, F::kDirectRows>(rows, w, x, x_stride, units, sink);
  }
  if constexpr (F::kDecodes) {
    F::decode(w, units, decoded);
    // The next block's codes, which come from afar: 5 % at 32 rows on 4 bits.
    const int64_t read = units * F::kUnitBytes;
    for (int64_t i = 0; i < read; i += kCacheLine) __builtin_prefetch(w + read + i);
    w = decoded;
  }
  const int64_t d_units = (k + D::kUnitK - 1) / D::kUnitK;
  // Tiles of nearly equal height: some are one higher than the others.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, low = rows / tiles;
  int64_t higher = rows % tiles;
  for (int64_t tile = 0; tile < tiles; ++tile, --higher) {
    const int64_t height = higher > 0 ? low + 1 : low;
    if (tile + 1 < tiles) prefetch_rows(x + height * x_stride, x_stride, height, k);
    dot_rows<D, kTileRows>(height, w, x, x_stride, d_units, sink);
    x += height * x_stride;
    sink.sums += height * kPanel;
    if (sink.end != nullptr) {
      sink.end->x_sums += height * sink.end->x_groups;
      sink.end->totals += height * kPanel;
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
      const int64_t run = run_k(a, q, t, begin, end);
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
                          {sums + i * part, first, last ? &group : nullptr, run});
      }
      begin = end;
      if (last) ++g;
    }
    finish_panels(a, q.scale + t.row, t, p, width, totals);
  }
}

}  // namespace
}  // namespace effinfer
