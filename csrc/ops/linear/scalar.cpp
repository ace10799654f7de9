// The definition, one output at a time.
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
  scalar::finish_each<X>(
      a, t,
      [&](int64_t row, int64_t panel, int64_t lane) { return dot<X, W>(a, row, panel, lane); },
      [&](int64_t row, int64_t n, float v) {
        scalar::put(static_cast<X*>(a.y) + row * a.y_stride + n, v);
      });
}

}  // namespace

void linear_scalar(const Linear& a, const LinearTask& t) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto w) { run<decltype(x), decltype(w)>(a, t); });
  });
}

}  // namespace effinfer
