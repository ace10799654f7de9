// rms_norm over vec.h: one pass to add and square, one to scale; the row stays in L1.
#include "base/vec.h"
#include "ops/rms_norm/rms_norm.h"

namespace effinfer {
namespace {

template <class X, class R, class O>
void normalise_row(const X* x, const R* residual, const float* weight, X* y, O* residual_out,
                   int64_t dim, float eps, bool unit_offset) {
  const auto row = [&](int64_t i) {
    return residual != nullptr ? load(x + i) + load(residual + i) : load(x + i);
  };
  const auto row_tail = [&](int64_t i, int64_t n) {
    return residual != nullptr ? load_n(x + i, n) + load_n(residual + i, n) : load_n(x + i, n);
  };
  const int64_t full = dim / kLanes * kLanes, tail = dim - full;
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= full; i += 4 * kLanes) {
    const Vec a = row(i), b = row(i + kLanes), c = row(i + 2 * kLanes), d = row(i + 3 * kLanes);
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
    s2 = fma(c, c, s2);
    s3 = fma(d, d, s3);
  }
  for (; i < full; i += kLanes) {
    const Vec a = row(i);
    s0 = fma(a, a, s0);
  }
  if (tail > 0) {
    const Vec a = row_tail(full, tail);
    s1 = fma(a, a, s1);
  }
  const float mean = sum((s0 + s1) + (s2 + s3)) / static_cast<float>(dim);
  const Vec scale = splat(1.f / __builtin_sqrtf(mean + eps));
  const Vec offset = splat(unit_offset ? 1.f : 0.f);

  for (i = 0; i < full; i += kLanes) {
    const Vec r = row(i);
    if (residual_out != nullptr) store(residual_out + i, r);
    const Vec w = weight != nullptr ? load(weight + i) + offset : splat(1.f);
    store(y + i, r * scale * w);
  }
  if (tail > 0) {
    const Vec r = row_tail(full, tail);
    if (residual_out != nullptr) store_n(residual_out + full, r, tail);
    const Vec w = weight != nullptr ? load_n(weight + full, tail) + offset : splat(1.f);
    store_n(y + full, r * scale * w, tail);
  }
}

template <class X, class R, class O>
void normalise_rows(const RmsNorm& a, int64_t begin, int64_t end) {
  const auto x = static_cast<const X*>(a.x);
  const auto residual = static_cast<const R*>(a.residual);
  const auto y = static_cast<X*>(a.y);
  const auto out = static_cast<O*>(a.residual_out);
  for (int64_t row = begin; row < end; ++row)
    normalise_row(
        x + row * a.x_stride, residual != nullptr ? residual + row * a.residual_stride : nullptr,
        a.weight, y + row * a.y_stride,
        out != nullptr ? out + row * a.residual_out_stride : nullptr, a.dim, a.eps, a.unit_offset);
}

void dispatch(const RmsNorm& a, int64_t begin, int64_t end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.residual_type, [&](auto r) {
      with_type(a.residual_out_type, [&](auto o) {
        normalise_rows<decltype(x), decltype(r), decltype(o)>(a, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace effinfer
