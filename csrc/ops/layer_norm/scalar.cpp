// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/layer_norm/layer_norm.h"
#include "ops/norm/types.h"

namespace effinfer {
namespace {

template <class X, class R, class O>
void normalise_rows(const LayerNorm& a, int64_t begin, int64_t end) {
  using scalar::get;
  using scalar::put;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    const R* residual = static_cast<const R*>(a.residual) + row * a.residual_stride;
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    O* out = static_cast<O*>(a.residual_out) + row * a.residual_out_stride;
    const auto value = [&](int64_t i) {
      return a.residual != nullptr ? get(x + i) + get(residual + i) : get(x + i);
    };
    double total = 0, squares = 0;
    for (int64_t i = 0; i < a.dim; ++i) total += value(i);
    const double mean = total / static_cast<double>(a.dim);
    for (int64_t i = 0; i < a.dim; ++i) squares += (value(i) - mean) * (value(i) - mean);
    const float scale =
        1.f / std::sqrt(static_cast<float>(squares / static_cast<double>(a.dim)) + a.eps);
    for (int64_t i = 0; i < a.dim; ++i) {
      const float r = value(i);
      const float w = a.weight != nullptr ? a.weight[i] : 1.f;
      const float b = a.bias != nullptr ? a.bias[i] : 0.f;
      if (a.residual_out != nullptr) put(out + i, r);
      put(y + i, static_cast<float>(r - mean) * scale * w + b);
    }
  }
}

}  // namespace

void layer_norm_scalar(const LayerNorm& a, int64_t begin, int64_t end) {
  with_norm_types(a.x_type, a.residual_type, a.residual_out_type, [&](auto x, auto r, auto o) {
    normalise_rows<decltype(x), decltype(r), decltype(o)>(a, begin, end);
  });
}

}  // namespace effinfer
