// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/norm/types.h"
#include "ops/rms_norm/rms_norm.h"

namespace effinfer {
namespace {

template <class X, class R, class O>
void normalise_rows(const RmsNorm& a, int64_t begin, int64_t end) {
  using scalar::get;
  using scalar::put;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride;
    const R* residual = static_cast<const R*>(a.residual) + row * a.residual_stride;
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    O* out = static_cast<O*>(a.residual_out) + row * a.residual_out_stride;
    const float* weight = a.index != nullptr ? a.weight + a.index[row] * a.dim : a.weight;
    const auto value = [&](int64_t i) {
      return a.residual != nullptr ? get(x + i) + get(residual + i) : get(x + i);
    };
    double squares = 0;
    for (int64_t i = 0; i < a.dim; ++i) squares += double{value(i)} * value(i);
    const float mean = static_cast<float>(squares / static_cast<double>(a.dim));
    const float scale = 1.f / std::sqrt(mean + a.eps);
    for (int64_t i = 0; i < a.dim; ++i) {
      const float r = value(i);
      const float w = weight == nullptr ? 1.f : weight[i] + (a.unit_offset ? 1.f : 0.f);
      if (a.residual_out != nullptr) put(out + i, r);
      put(y + i, r * scale * w);
    }
  }
}

}  // namespace

void rms_norm_scalar(const RmsNorm& a, int64_t begin, int64_t end) {
  with_norm_types(a.x_type, a.residual_type, a.residual_out_type, [&](auto x, auto r, auto o) {
    normalise_rows<decltype(x), decltype(r), decltype(o)>(a, begin, end);
  });
}

}  // namespace effinfer
