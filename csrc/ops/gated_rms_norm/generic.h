// gated_rms_norm over vec.h. Gating first, the gated values are kept between the two passes, for
// silu is the dear part: float32 ones in y; 16-bit rows would lose bits there and keep them on the
// stack, and only groups too long for that gate twice.
#include "ops/gated_rms_norm/gated_rms_norm.h"
#include "ops/norm/rows.h"

namespace effinfer {
namespace {

constexpr int64_t kKeptMost = 8192;  // floats: a stack's fair share, and the nearest cache's size

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

// kept = x silu(z), kTogether vectors at a time, for one silu is a chain of latencies.
template <class T>
void gate_row(const T* x, const T* z, float* kept, int64_t dim) {
  constexpr int kTogether = 4;
  int64_t begin = 0;
  for (; begin + kTogether * kLanes <= dim; begin += kTogether * kLanes) {
    Vec gate[kTogether];
    EFFINFER_UNROLL
    for (int v = 0; v < kTogether; ++v) gate[v] = load(z + begin + v * kLanes);
    silu_each(gate);
    EFFINFER_UNROLL
    for (int v = 0; v < kTogether; ++v)
      store(kept + begin + v * kLanes, load(x + begin + v * kLanes) * gate[v]);
  }
  each_vector(dim - begin, [&](auto access, int64_t i) {
    const int64_t at = begin + i;
    access.put(kept + at, access.get(x + at) * silu(access.get(z + at)));
  });
}

template <class T>
void gate_then_norm(const T* x, const T* z, const float* weight, T* y, int64_t dim, float eps) {
  constexpr T* kNoGate = nullptr;
  const auto keep_in = [&](float* kept) {
    gate_row(x, z, kept, dim);
    const auto row = [&](auto access, int64_t i) { return access.get(kept + i); };
    normalise(row, scale_of(sum_row(dim, row, add_square), dim, eps), weight, kNoGate, y, dim);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    keep_in(y);
  } else if (dim <= kKeptMost) {
    float kept[kKeptMost];
    keep_in(kept);
  } else {
    const auto gated = [&](auto access, int64_t i) {
      return access.get(x + i) * silu(access.get(z + i));
    };
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
