// rms_norm over vec.h: one pass to add and square, one to scale; the row stays in L1.
#include "ops/norm/rows.h"
#include "ops/rms_norm/rms_norm.h"

namespace effinfer {
namespace {

template <class X, class R, class O>
void normalise_row(Residual<X, R> row, const float* weight, X* y, O* residual_out, int64_t dim,
                   float eps, bool unit_offset) {
  const float squares = sum_row(dim, row, [](Vec r, Vec s) { return fma(r, r, s); });
  const Vec scale = splat(1.f / __builtin_sqrtf(squares / static_cast<float>(dim) + eps));
  const Vec offset = splat(unit_offset ? 1.f : 0.f);
  each_vector(dim, [&](auto access, int64_t i) {
    const Vec r = row(access, i);
    if (residual_out != nullptr) access.put(residual_out + i, r);
    const Vec w = weight != nullptr ? access.get(weight + i) + offset : splat(1.f);
    access.put(y + i, r * scale * w);
  });
}

void dispatch(const RmsNorm& a, int64_t begin, int64_t end) {
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
          a.index != nullptr ? a.weight + a.index[i] * a.dim : a.weight, ys + i * a.y_stride,
          out != nullptr ? out + i * a.residual_out_stride : nullptr, a.dim, a.eps, a.unit_offset);
  });
}

}  // namespace
}  // namespace effinfer
