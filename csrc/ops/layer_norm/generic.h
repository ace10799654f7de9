// layer_norm over vec.h: a pass for the mean, one for the variance, one to scale, and one more
// where the mean dwarfs the spread; the row stays in L1.
#include "ops/layer_norm/layer_norm.h"
#include "ops/norm/rows.h"

namespace effinfer {
namespace {

template <class X, class R, class O>
void normalise_row(Residual<X, R> row, const float* weight, const float* bias, X* y,
                   O* residual_out, int64_t dim, float eps) {
  const float count = static_cast<float>(dim);
  const Vec mean = splat(sum_row(dim, row, [](Vec r, Vec s) { return s + r; }) / count);
  const float squares = sum_row(dim, row, [&](Vec r, Vec s) { return fma(r - mean, r - mean, s); });
  float variance = squares / count, rest = 0.f;
  if (mean[0] * mean[0] > 16.f * variance) {  // then the mean's own rounding would shift the row
    rest = sum_row(dim, row, [&](Vec r, Vec s) { return s + (r - mean); }) / count;
    variance -= rest * rest;
  }
  const Vec scale = splat(1.f / __builtin_sqrtf(variance + eps)), shift = splat(rest);
  each_vector(dim, [&](auto access, int64_t i) {
    const Vec r = row(access, i);
    if (residual_out != nullptr) access.put(residual_out + i, r);
    const Vec w = weight != nullptr ? access.get(weight + i) : splat(1.f);
    const Vec b = bias != nullptr ? access.get(bias + i) : Vec{};
    access.put(y + i, fma((r - mean - shift) * scale, w, b));
  });
}

void dispatch(const LayerNorm& a, int64_t begin, int64_t end) {
  with_norm_types(a.x_type, a.residual_type, a.residual_out_type, [&](auto x, auto r, auto o) {
    const auto* xs = static_cast<const decltype(x)*>(a.x);
    const auto* residual = static_cast<const decltype(r)*>(a.residual);
    auto* ys = static_cast<decltype(x)*>(a.y);
    auto* out = static_cast<decltype(o)*>(a.residual_out);
    for (int64_t i = begin; i < end; ++i)
      normalise_row(
          Residual<decltype(x), decltype(r)>{
              xs + i * a.x_stride,
              residual != nullptr ? residual + i * a.residual_stride : nullptr},
          a.weight, a.bias, ys + i * a.y_stride,
          out != nullptr ? out + i * a.residual_out_stride : nullptr, a.dim, a.eps);
  });
}

}  // namespace
}  // namespace effinfer
