// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/low_rank_add/low_rank_add.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

template <class X, class W>
void down_half(const LowRankAdd& a, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    const W* down = static_cast<const W*>(a.down) + a.index[row] * a.rank * a.k;
    for (int64_t r = begin; r < end; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < a.k; ++i) sum += double{get(x + i)} * get(down + r * a.k + i);
      a.low[row * a.rank + r] = static_cast<float>(sum);
    }
  }
}

// One panel of a part, for one row.
template <class X, class W>
void add_panel(const float* low, const W* panel, int64_t rank, const float* bias, X* y,
               int64_t outputs) {
  for (int64_t j = 0; j < outputs; ++j) {
    double sum = bias != nullptr ? bias[j] : 0;
    for (int64_t r = 0; r < rank; ++r)
      sum += double{low[r]} * get(panel + r * LowRankAdd::kPanel + j);
    put(y + j, get(y + j) + static_cast<float>(sum));
  }
}

template <class X, class W>
void up_half(const LowRankAdd& a, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = LowRankAdd::kPanel;
  for (int64_t row = 0; row < a.rows; ++row) {
    const W* up = static_cast<const W*>(a.up) + a.index[row] * a.up_size;
    const float* bias = a.bias != nullptr ? a.bias + a.index[row] * a.n : nullptr;
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    const float* low = a.low + row * a.rank;
    int64_t number = 0;
    for (int p = 0; p < a.part_count; ++p) {
      const LowRankAdd::Part part = a.parts[p];
      for (int64_t column = 0; column < part.outputs; column += kPanel, ++number) {
        const int64_t left = part.outputs - column;
        if (number >= begin && number < end)
          add_panel(low, up, part.rank, bias != nullptr ? bias + column : nullptr, y + column,
                    left < kPanel ? left : kPanel);
        up += kPanel * part.rank;
      }
      bias = bias != nullptr ? bias + part.outputs : nullptr;
      y += part.outputs;
      low += part.rank;
    }
  }
}

}  // namespace

void low_rank_add_scalar(const LowRankAdd& a, LowRankHalf half, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto weight) {
      const auto run = half == LowRankHalf::down ? &down_half<decltype(x), decltype(weight)>
                                                 : &up_half<decltype(x), decltype(weight)>;
      run(a, begin, end);
    });
  });
}

}  // namespace effinfer
