// One task with int8 activations: blocking and arithmetic that every instruction set shares. A file
// that includes it has defined before
//   - a struct for each packed format (see formats_*.h): kUnitK, kUnitBytes, kStep, kCentre (what a
//     sum of codes times x lacks to be one of values) and decode(packed, units, decoded), which
//     writes units of kind Decoded; for formats that are decoded before use also `Decoded`, else it
//     is the format itself;
//   - dot<F, R>(w, x, x_stride, units, sums): sums [R, 16] += units of w times R rows of x, exact;
//   - kDirectRows, up to which codes are decoded in registers for each use; kTileRows, the rows of
//     the largest dot.
#pragma once
#include "ops/linear/epilogue.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

using namespace linear_layout;
using lowbit::kBlock;
using lowbit::kSideBySide;

constexpr int kVecs = static_cast<int>(kPanel) / kLanes;  // of a panel

// typedef, for its size depends on no template parameter
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// The numbers of one group of one panel.
struct Group {
  Vec scale[kVecs], offset[kVecs];
  IVec zero[kVecs];
};

Group load_group(const LowbitWeight& w, int64_t panel, int64_t g, int32_t centre) {
  Group out;
  const int64_t at = panel * w.scale_stride + g * kPanel;
  const int32_t lost = lowbit::layout(w.format).centre - centre;  // by values and zeros alike
  with_type(w.scale_type, [&](auto type) {
    using T = decltype(type);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      out.scale[v] = load(static_cast<const T*>(w.scale) + at + v * kLanes);
      if (w.offset != nullptr)
        out.offset[v] = load(static_cast<const T*>(w.offset) + at + v * kLanes);
    }
  });
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    if (w.zero == nullptr) {
      out.zero[v] = splat_i(centre);
    } else {
      const Bytes codes = *reinterpret_cast<const Bytes*>(w.zero + at + v * kLanes);
      out.zero[v] = __builtin_convertvector(codes, IVec) - splat_i(lost);
    }
  }
  return out;
}

// totals [rows, 16] = fma(offset, X, fma(scale, S, totals)), with S = kStep sums - zero X; the sums
// are left zero for the next group.
template <int kStep>
void finish_group(const Group& g, const int32_t* x_sums, int64_t x_groups, int64_t rows,
                  bool offset, int32_t* sums, float* totals) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, totals += kPanel) {
    const IVec x = splat_i(x_sums[r * x_groups]);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      IVec s;
      memcpy(&s, sums + v * kLanes, sizeof(s));
      s = s * kStep - g.zero[v] * x;
      Vec t = load(totals + v * kLanes);
      t = fma(g.scale[v], __builtin_convertvector(s, Vec), t);
      if (offset) t = fma(g.offset[v], __builtin_convertvector(x, Vec), t);
      store(totals + v * kLanes, t);
    }
    memset(sums, 0, kPanel * sizeof(*sums));
  }
}

// dot for a run-time number of rows up to R.
template <class F, int R>
EFFINFER_INLINE void dot_rows(int64_t rows, const uint8_t* w, const int8_t* x, int64_t x_stride,
                              int64_t units, int32_t* sums) {
  if constexpr (R > 1) {
    if (rows < R) return dot_rows<F, R - 1>(rows, w, x, x_stride, units, sums);
  }
  dot<F, R>(w, x, x_stride, units, sums);
}

// All rows times one block of one panel.
template <class F>
void multiply_block(const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t k, int64_t rows,
                    uint8_t* decoded, int32_t* sums) {
  const int64_t units = (k + F::kUnitK - 1) / F::kUnitK;
  using D = typename F::Decoded;
  if constexpr (F::kDirectRows > 0) {
    if (rows <= F::kDirectRows)
      return dot_rows<F, F::kDirectRows>(rows, w, x, x_stride, units, sums);
  }
  if constexpr (F::kDecodes) {
    F::decode(w, units, decoded);
    w = decoded;
  }
  const int64_t d_units = (k + D::kUnitK - 1) / D::kUnitK;
  // Tiles of nearly equal height.
  for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t height = rows / tiles;
    dot_rows<D, kTileRows>(height, w, x, x_stride, d_units, sums);
    rows -= height;
    x += height * x_stride;
    sums += height * kPanel;
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

// A few panels walk down k together, block by block, so that as many streams of weights are read;
// sums of a group that is longer than a block wait in `sums`.
template <class F>
void int8_task(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  constexpr int64_t kUnits = kBlock / F::kUnitK;
  const LowbitWeight& w = a.weight;
  const int64_t k = a.io.k, part = t.rows * kPanel;
  const int64_t side = t.rows <= kDirectRows ? kSideBySide : takes_two(a.io.epilogue) ? 2 : 1;
  float* const totals = t.scratch;
  auto* const sums = reinterpret_cast<int32_t*>(totals + kSideBySide * part);
  auto* const decoded = reinterpret_cast<uint8_t*>(sums + kSideBySide * part);
  const int8_t* const x = q.codes + t.row * q.stride;
  const int32_t* const x_sums = q.sums + t.row * q.groups;
  for (int64_t p = 0; p < t.panels; p += side) {
    const int64_t width = t.panels - p < side ? t.panels - p : side;
    memset(totals, 0, static_cast<size_t>(width * part) * sizeof(float));
    memset(sums, 0, static_cast<size_t>(width * part) * sizeof(int32_t));
    for (int64_t g = 0, begin = 0; begin < k;) {
      const int64_t group_end = (g + 1) * w.group < k ? (g + 1) * w.group : k;
      const int64_t block = kUnits * F::kUnitK;
      const int64_t end = begin + block < group_end ? begin + block : group_end;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t panel = t.panel + p + i;
        const uint8_t* const packed =
            w.packed + panel * w.panel_stride + begin / F::kUnitK * F::kUnitBytes;
        multiply_block<F>(packed, x + begin, q.stride, end - begin, t.rows, decoded,
                          sums + i * part);
        if (end == group_end)
          finish_group<F::kStep>(load_group(w, panel, g, F::kCentre), x_sums + g, q.groups, t.rows,
                                 w.offset != nullptr, sums + i * part, totals + i * part);
      }
      begin = end;
      if (end == group_end) ++g;
    }
    finish_panels(a, q.scale + t.row, t, p, width, totals);
  }
}

}  // namespace
}  // namespace effinfer
