// low_rank_add over vec.h: tiles of up to four rows of one group, their sums in registers.
#include <type_traits>

#include "base/vec.h"
#include "ops/low_rank_add/low_rank_add.h"

namespace effinfer {
namespace {

// body(rows, first) for tiles of 4, 2 or 1 rows that have one group, rows as a constant.
template <class Body>
EFFINFER_INLINE void each_tile(const LowRankAdd& a, int64_t begin, int64_t end, Body body) {
  for (int64_t first = begin; first < end;) {
    const auto alike = [&](int64_t row) { return row < end && a.index[row] == a.index[first]; };
    if (alike(first + 1) && alike(first + 2) && alike(first + 3)) {
      body(std::integral_constant<int, 4>{}, first);
      first += 4;
    } else if (alike(first + 1)) {
      body(std::integral_constant<int, 2>{}, first);
      first += 2;
    } else {
      body(std::integral_constant<int, 1>{}, first);
      first += 1;
    }
  }
}

// kRows rows of x times kCount rows of down. Every product is one vector of partial sums.
template <int kRows, int kCount, class X, class W>
EFFINFER_INLINE void multiply_down(const X* x, int64_t x_stride, const W* down, int64_t k,
                                   float* low, int64_t low_stride) {
  Vec sums[kRows][kCount] = {};
  const auto add = [&](auto get, int64_t i) {
    Vec values[kRows];
    for (int r = 0; r < kRows; ++r) values[r] = get(x + r * x_stride + i);
    for (int c = 0; c < kCount; ++c) {
      const Vec weight = get(down + c * k + i);
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(values[r], weight, sums[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) add([](auto* p) { return load(p); }, i);
  if (i < k) add([n = k - i](auto* p) { return load_n(p, n); }, i);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCount; ++c) low[r * low_stride + c] = sum(sums[r][c]);
}

// The low-rank products of a tile.
template <int kRows, class X, class W>
EFFINFER_INLINE void down_tile(const LowRankAdd& a, int64_t first) {
  const X* x = static_cast<const X*>(a.x) + first * a.x_stride;
  const W* down = static_cast<const W*>(a.down) + a.index[first] * a.rank * a.k;
  float* low = a.low + first * a.rank;
  constexpr int kCount = kRows == 4 ? 2 : 4;  // eight sums, or four for a lone row
  int64_t at = 0;
  for (; at + kCount <= a.rank; at += kCount)
    multiply_down<kRows, kCount>(x, a.x_stride, down + at * a.k, a.k, low + at, a.rank);
  for (; at < a.rank; ++at)
    multiply_down<kRows, 1>(x, a.x_stride, down + at * a.k, a.k, low + at, a.rank);
}

// One panel of 16 outputs for kRows rows; `outputs` of them exist.
template <int kRows, class X, class W>
EFFINFER_INLINE void add_panel(const float* low, int64_t low_stride, const W* panel, int64_t rank,
                               const float* bias, X* y, int64_t y_stride, int64_t outputs) {
  constexpr int kVecs = LowRankAdd::kPanel / kLanes;
  Vec sums[kRows][kVecs] = {};
  for (int64_t k = 0; k < rank; ++k, panel += LowRankAdd::kPanel)
    for (int v = 0; v < kVecs; ++v) {
      const Vec weight = load(panel + v * kLanes);
      for (int r = 0; r < kRows; ++r)
        sums[r][v] = fma(splat(low[r * low_stride + k]), weight, sums[r][v]);
    }
  const auto finish = [&](int v, auto get, auto put) {
    const Vec added = bias != nullptr ? get(bias + v * kLanes) : Vec{};
    for (int r = 0; r < kRows; ++r) {
      X* out = y + r * y_stride + v * kLanes;
      put(out, get(out) + (sums[r][v] + added));
    }
  };
  for (int v = 0; v < kVecs; ++v) {
    const int64_t left = outputs - v * kLanes;
    if (left >= kLanes)
      finish(v, [](auto* p) { return load(p); }, [](auto* p, Vec x) { store(p, x); });
    else if (left > 0)
      finish(
          v, [=](auto* p) { return load_n(p, left); },
          [=](auto* p, Vec x) { store_n(p, x, left); });
  }
}

// What those add to the tile's outputs.
template <int kRows, class X, class W>
EFFINFER_INLINE void up_tile(const LowRankAdd& a, int64_t first) {
  constexpr int64_t kPanel = LowRankAdd::kPanel;
  const int64_t group = a.index[first];
  const W* up = static_cast<const W*>(a.up) + group * a.up_size;
  const float* bias = a.bias != nullptr ? a.bias + group * a.n : nullptr;
  X* y = static_cast<X*>(a.y) + first * a.y_stride;
  const float* low = a.low + first * a.rank;
  for (int p = 0; p < a.part_count; ++p) {
    const LowRankAdd::Part part = a.parts[p];
    for (int64_t column = 0; column < part.outputs; column += kPanel) {
      const int64_t left = part.outputs - column;
      add_panel<kRows>(low, a.rank, up, part.rank, bias != nullptr ? bias + column : nullptr,
                       y + column, a.y_stride, left < kPanel ? left : kPanel);
      up += kPanel * part.rank;
    }
    bias = bias != nullptr ? bias + part.outputs : nullptr;
    y += part.outputs;
    low += part.rank;
  }
}

void dispatch(const LowRankAdd& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto weight) {
      each_tile(a, begin, end, [&](auto rows, int64_t first) {
        down_tile<rows(), decltype(x), decltype(weight)>(a, first);
        up_tile<rows(), decltype(x), decltype(weight)>(a, first);
      });
    });
  });
}

}  // namespace
}  // namespace effinfer
