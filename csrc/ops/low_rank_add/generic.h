// low_rank_add over vec.h: tiles of up to four rows of one group, their sums in registers.
#include <type_traits>

#include "base/vec.h"
#include "ops/low_rank_add/low_rank_add.h"

namespace effinfer {
namespace {

// body(rows, first) for tiles of 4, 2 or 1 rows that have one group, rows as a constant.
template <class Body>
EFFINFER_INLINE void each_tile(const LowRankAdd& a, Body body) {
  for (int64_t first = 0; first < a.rows;) {
    const auto alike = [&](int64_t row) { return row < a.rows && a.index[row] == a.index[first]; };
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

template <class X, class W>
void down_half(const LowRankAdd& a, int64_t begin, int64_t end) {
  each_tile(a, [&](auto rows, int64_t first) {
    const X* x = static_cast<const X*>(a.x) + first * a.x_stride;
    const W* down = static_cast<const W*>(a.down) + a.index[first] * a.rank * a.k;
    float* low = a.low + first * a.rank;
    constexpr int kCount = rows() == 4 ? 2 : 4;  // eight sums, or four for a lone row
    int64_t at = begin;
    for (; at + kCount <= end; at += kCount)
      multiply_down<rows(), kCount>(x, a.x_stride, down + at * a.k, a.k, low + at, a.rank);
    for (; at < end; ++at)
      multiply_down<rows(), 1>(x, a.x_stride, down + at * a.k, a.k, low + at, a.rank);
  });
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

template <class X, class W>
void up_half(const LowRankAdd& a, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = LowRankAdd::kPanel;
  each_tile(a, [&](auto rows, int64_t first) {
    const int64_t group = a.index[first];
    const W* up = static_cast<const W*>(a.up) + group * a.up_size;
    const float* bias = a.bias != nullptr ? a.bias + group * a.n : nullptr;
    X* y = static_cast<X*>(a.y) + first * a.y_stride;
    const float* low = a.low + first * a.rank;
    int64_t passed = 0;  // panels of the parts before
    for (int p = 0; p < a.part_count; ++p) {
      const LowRankAdd::Part part = a.parts[p];
      const int64_t panels = part.panels();
      const int64_t from = begin > passed ? begin - passed : 0;
      const int64_t to = end - passed < panels ? end - passed : panels;
      for (int64_t at = from; at < to; ++at) {
        const int64_t column = at * kPanel, left = part.outputs - column;
        add_panel<rows()>(low, a.rank, up + column * part.rank, part.rank,
                          bias != nullptr ? bias + column : nullptr, y + column, a.y_stride,
                          left < kPanel ? left : kPanel);
      }
      up += panels * kPanel * part.rank;
      bias = bias != nullptr ? bias + part.outputs : nullptr;
      y += part.outputs;
      low += part.rank;
      passed += panels;
    }
  });
}

void dispatch(const LowRankAdd& a, LowRankHalf half, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto weight) {
      const auto run = half == LowRankHalf::down ? &down_half<decltype(x), decltype(weight)>
                                                 : &up_half<decltype(x), decltype(weight)>;
      run(a, begin, end);
    });
  });
}

}  // namespace
}  // namespace effinfer
