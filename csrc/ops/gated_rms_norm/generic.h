// gated_rms_norm over vec.h. Gating first, float32 rows keep the gated values in y between the two
// passes, for silu is the dear part; 16-bit rows would lose bits there, and gate twice.
#include "ops/gated_rms_norm/gated_rms_norm.h"
#include "ops/norm/rows.h"

namespace effinfer {
namespace {

EFFINFER_INLINE Vec add_square(Vec r, Vec s) { return fma(r, r, s); }

EFFINFER_INLINE Vec scale_of(float squares, int64_t count, float eps) {
  return splat(1.f / __builtin_sqrtf(squares / static_cast<float>(count) + eps));
}

// norm(row) into y, times silu(z) where z is given.
template <class Row, class T>
EFFINFER_INLINE void normalise(Row row, Vec scale, const float* weight, const T* z, T* y,
                               int64_t dim) {
  each_vector(dim, [&](auto access, int64_t i) {
    const Vec w = weight != nullptr ? access.get(weight + i) : splat(1.f);
    const Vec normed = row(access, i) * scale * w;
    access.put(y + i, z != nullptr ? normed * silu(access.get(z + i)) : normed);
  });
}

template <class T>
void plain_then_gate(const T* x, const T* z, const float* weight, T* y, int64_t dim, float eps) {
  const auto row = [&](auto access, int64_t i) { return access.get(x + i); };
  normalise(row, scale_of(sum_row(dim, row, add_square), dim, eps), weight, z, y, dim);
}

template <class T>
void gate_then_norm(const T* x, const T* z, const float* weight, T* y, int64_t dim, float eps) {
  constexpr T* kNoGate = nullptr;
  const auto gated = [&](auto access, int64_t i) {
    return access.get(x + i) * silu(access.get(z + i));
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto keep = [&](auto access, int64_t i) {
      const Vec r = gated(access, i);
      access.put(y + i, r);
      return r;
    };
    const auto kept = [&](auto access, int64_t i) { return access.get(y + i); };
    normalise(kept, scale_of(sum_row(dim, keep, add_square), dim, eps), weight, kNoGate, y, dim);
  } else {
    normalise(gated, scale_of(sum_row(dim, gated, add_square), dim, eps), weight, kNoGate, y, dim);
  }
}

void dispatch(const GatedRmsNorm& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const auto run = a.norm_before_gate || a.z == nullptr ? plain_then_gate<T> : gate_then_norm<T>;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < a.dim; i += a.group)
        run(static_cast<const T*>(a.x) + row * a.x_stride + i,
            a.z != nullptr ? static_cast<const T*>(a.z) + row * a.z_stride + i : nullptr,
            a.weight != nullptr ? a.weight + i : nullptr,
            static_cast<T*>(a.y) + row * a.y_stride + i, a.group, a.eps);
  });
}

}  // namespace
}  // namespace effinfer
