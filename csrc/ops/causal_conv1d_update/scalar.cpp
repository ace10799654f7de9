// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/causal_conv1d_update/causal_conv1d_update.h"

namespace effinfer {
namespace {

template <class X, class S>
void step(const CausalConv1dUpdate& a, int64_t d, const X* x, S* state, X* y) {
  using scalar::get;
  using scalar::put;
  const auto column = [&](int64_t c) { return state + c * a.state_column; };
  const float* weight = a.weight + d * a.width;
  float sum = a.bias != nullptr ? a.bias[d] : 0.f;
  for (int64_t j = 0; j < a.width - 1; ++j)
    sum += weight[j] * get(column(a.columns - (a.width - 1 - j) * a.dilation));
  sum += weight[a.width - 1] * get(x);
  put(y, a.silu ? scalar::silu(sum) : sum);
  for (int64_t c = 0; c + 1 < a.columns; ++c) *column(c) = *column(c + 1);
  if (a.columns > 0) put(column(a.columns - 1), get(x));
}

template <class X, class S>
void update(const CausalConv1dUpdate& a, int64_t dim_begin, int64_t dim_end) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t slot = a.slots != nullptr ? a.slots[b] : b;
    for (int64_t d = dim_begin; d < dim_end; ++d) {
      for (int64_t t = 0; t < a.length; ++t) {
        const X* x = static_cast<const X*>(a.x) + b * a.x_batch + d * a.x_dim + t * a.x_time;
        X* y = static_cast<X*>(a.y) + b * a.y_batch + d * a.y_dim + t * a.y_time;
        if (slot < 0)
          scalar::put(y, 0.f);
        else
          step(a, d, x, static_cast<S*>(a.state) + slot * a.state_slot + d * a.state_dim, y);
      }
    }
  }
}

}  // namespace

void causal_conv1d_update_scalar(const CausalConv1dUpdate& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) {
    with_type(a.state_type, [&](auto s) { update<decltype(x), decltype(s)>(a, begin, end); });
  });
}

}  // namespace effinfer
