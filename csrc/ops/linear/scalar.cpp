// The definition, one output at a time.
#include "base/scalar.h"

#include "ops/linear/linear.h"
#include "ops/linear/scalar_epilogue.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// Where output `lane` of a panel lies in its 16 elements.
template <class W>
constexpr int64_t place(int64_t lane) {
  return lane;
}
template <>
constexpr int64_t place<bf16>(int64_t lane) {
  return lane < 8 ? 2 * lane : 2 * lane - 15;
}

template <class X, class W>
float dot(const Linear& a, int64_t row, int64_t panel, int64_t lane) {
  const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
  const W* w = static_cast<const W*>(a.weight) + panel * a.k * kPanel + place<W>(lane);
  float total = 0;
  for (int64_t begin = 0; begin < a.k; begin += kTerms) {
    const int64_t end = begin + kTerms < a.k ? begin + kTerms : a.k;
    float sum = 0;
    for (int64_t k = begin; k < end; ++k)
      sum = std::fma(scalar::get(x + k), scalar::get(w + k * kPanel), sum);
    total = begin == 0 ? sum : total + sum;
  }
  return total;
}

template <class X, class W>
void run(const Linear& a, const LinearTask& t) {
  const int64_t step = takes_two(a.epilogue) ? 2 : 1;
  for (int64_t row = t.row; row < t.row + t.rows; ++row) {
    const X* residual = static_cast<const X*>(a.residual) + row * a.residual_stride;
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    for (int64_t panel = t.panel; panel < t.panel + t.panels; panel += step) {
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t n = panel / step * kPanel + lane;
        if (n >= a.n) break;
        float v = dot<X, W>(a, row, panel, lane) + (a.bias != nullptr ? a.bias[n] : 0.f);
        v = scalar::activate(a.epilogue, v);
        if (step == 2)
          v *= dot<X, W>(a, row, panel + 1, lane) + (a.bias != nullptr ? a.bias[a.n + n] : 0.f);
        scalar::put(y + n, a.residual != nullptr ? v + scalar::get(residual + n) : v);
      }
    }
  }
}

}  // namespace

void linear_scalar(const Linear& a, const LinearTask& t) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto w) { run<decltype(x), decltype(w)>(a, t); });
  });
}

}  // namespace effinfer
