// softmax_top2 over vec.h: one pass for the two largest, one for the sum.
#include "ops/norm/rows.h"
#include "ops/softmax_top2/softmax_top2.h"

namespace effinfer {
namespace {

struct Top2 {
  Vec first = splat(-__builtin_inff()), second = first;
  EFFINFER_INLINE void see(Vec x) {
    second = max(second, min(first, x));
    first = max(first, x);
  }
};

template <class T>
EFFINFER_INLINE void two_of_row(const T* x, float* y, int64_t dim) {
  Top2 even, odd;  // two chains, as each step waits for the one before
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    even.see(load(x + i));
    odd.see(load(x + i + kLanes));
  }
  for (; i + kLanes <= dim; i += kLanes) even.see(load(x + i));
  float candidates[5 * kLanes];
  store(candidates, even.first);
  store(candidates + kLanes, even.second);
  store(candidates + 2 * kLanes, odd.first);
  store(candidates + 3 * kLanes, odd.second);
  const int64_t rest = dim - i;
  if (rest > 0) store_n(candidates + 4 * kLanes, load_n(x + i, rest), rest);
  float first = -__builtin_inff(), second = first;
  for (int64_t c = 0; c < 4 * kLanes + rest; ++c) {
    const float value = candidates[c];
    if (value > first) {
      second = first;
      first = value;
    } else if (value > second) {
      second = value;
    }
  }
  // A NaN is passed over above and makes the sum NaN, as do infinities.
  const Vec largest = splat(first);
  const auto below = [&](auto access, int64_t at) { return access.get(x + at) - largest; };
  const float total = sum_row(dim, below, [](Vec v, Vec s) { return s + exp(v); });
  float ratio[kLanes];
  store(ratio, exp(splat(second - first)));
  y[0] = 1.f / total;
  y[1] = ratio[0] / total;
}

void dispatch(const SoftmaxTop2& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    const auto* const x = static_cast<const decltype(type)*>(a.x);
    for (int64_t row = begin; row < end; ++row)
      two_of_row(x + row * a.x_stride, a.y + 2 * row, a.dim);
  });
}

}  // namespace
}  // namespace effinfer
