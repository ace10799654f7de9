// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/low_rank_add/low_rank_add.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

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
void add_row(const LowRankAdd& a, int64_t row) {
  constexpr int64_t kPanel = LowRankAdd::kPanel;
  const int64_t group = a.index[row];
  const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
  const W* down = static_cast<const W*>(a.down) + group * a.rank * a.k;
  float* low = a.low + row * a.rank;
  for (int64_t r = 0; r < a.rank; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < a.k; ++i) sum += double{get(x + i)} * get(down + r * a.k + i);
    low[r] = static_cast<float>(sum);
  }
  const W* up = static_cast<const W*>(a.up) + group * a.up_size;
  const float* bias = a.bias != nullptr ? a.bias + group * a.n : nullptr;
  X* y = static_cast<X*>(a.y) + row * a.y_stride;
  for (int p = 0; p < a.part_count; ++p) {
    const LowRankAdd::Part part = a.parts[p];
    for (int64_t column = 0; column < part.outputs; column += kPanel) {
      const int64_t left = part.outputs - column;
      add_panel(low, up, part.rank, bias != nullptr ? bias + column : nullptr, y + column,
                left < kPanel ? left : kPanel);
      up += kPanel * part.rank;
    }
    bias = bias != nullptr ? bias + part.outputs : nullptr;
    y += part.outputs;
    low += part.rank;
  }
}

}  // namespace

void low_rank_add_scalar(const LowRankAdd& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto weight) {
      for (int64_t row = begin; row < end; ++row) add_row<decltype(x), decltype(weight)>(a, row);
    });
  });
}

}  // namespace effinfer
