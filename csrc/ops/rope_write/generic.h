// rope_write over vec.h: row by row, while its heads are in L1.
#include "base/vec.h"
#include "ops/rope_write/rope_write.h"

namespace effinfer {
namespace {

// Up to kLanes elements at p, zeros for the rest; and back.
template <class T>
EFFINFER_INLINE Vec load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, left);
}
template <class T>
EFFINFER_INLINE void store_up_to(T* p, Vec x, int64_t left) {
  if (left >= kLanes)
    store(p, x);
  else
    store_n(p, x, left);
}

// Each lane's neighbour in its pair.
template <int... j>
EFFINFER_INLINE Vec neighbours(Vec x, Lanes<j...>) {
  return __builtin_shufflevector(x, x, (j ^ 1)...);
}
template <int... j>
EFFINFER_INLINE Vec minus_even(Vec x, Lanes<j...>) {
  return from_bits(bits_of(x) ^ IVec{(j % 2 == 0 ? INT32_MIN : 0)...});
}

// One head; products are rounded before they are added.
template <class T>
EFFINFER_INLINE void rotate_halves(T* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Vec first = load_up_to(x + i, left), second = load_up_to(x + half + i, left);
    const Vec new_first =
        rounded(first * load_up_to(cos + i, left)) - rounded(second * load_up_to(sin + i, left));
    const Vec new_second = rounded(second * load_up_to(cos + half + i, left)) +
                           rounded(first * load_up_to(sin + half + i, left));
    store_up_to(x + i, new_first, left);
    store_up_to(x + half + i, new_second, left);
  }
}

template <class T>
EFFINFER_INLINE void rotate_pairs(T* x, const float* cos, const float* sin, int64_t dim) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t left = dim - i;
    const Vec here = load_up_to(x + i, left);
    const Vec turned = minus_even(neighbours(here, AllLanes{}), AllLanes{});
    store_up_to(
        x + i,
        rounded(here * load_up_to(cos + i, left)) + rounded(turned * load_up_to(sin + i, left)),
        left);
  }
}

template <class T, class P>
__attribute__((noinline)) void write(const T* x, int64_t heads, int64_t dim, P* to,
                                     int64_t head_stride) {
  for (int64_t h = 0; h < heads; ++h, x += dim, to += head_stride)
    for (int64_t d = 0; d < dim; d += kLanes)
      store_up_to(to + d, load_up_to(x + d, dim - d), dim - d);
}

// The same for elements `dim_stride` apart: a slot of keys in columns.
template <class T, class P>
__attribute__((noinline)) void write_column(const T* x, int64_t heads, int64_t dim, P* to,
                                            int64_t head_stride, int64_t dim_stride) {
  for (int64_t h = 0; h < heads; ++h, x += dim, to += head_stride)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t left = dim - d;
      store_strided(to + d * dim_stride, dim_stride, load_up_to(x + d, left),
                    left < kLanes ? left : kLanes);
    }
}

template <class T>
EFFINFER_INLINE void write_slot(const RopeWrite& a, int64_t row, const T* x,
                                const WrittenPages& pages) {
  const int64_t plane = a.plane != nullptr ? a.plane[row] : 0, slot = a.slot[row];
  const int64_t at = plane * pages.plane_stride + slot / a.block_size * pages.block_stride +
                     slot % a.block_size * pages.slot_stride;
  with_type(pages.type, [&](auto p) {
    auto* const to = static_cast<decltype(p)*>(pages.data) + at;
    if (pages.dim_stride == 1)
      write(x, a.kv_heads, pages.dim, to, pages.head_stride);
    else
      write_column(x, a.kv_heads, pages.dim, to, pages.head_stride, pages.dim_stride);
  });
}

template <class T>
__attribute__((noinline)) void rotate_heads(T* x, int64_t heads, int64_t head_dim, const float* cos,
                                            const float* sin, int64_t rotary_dim,
                                            bool interleaved) {
  for (int64_t h = 0; h < heads; ++h, x += head_dim)
    if (interleaved)
      rotate_pairs(x, cos, sin, rotary_dim);
    else
      rotate_halves(x, cos, sin, rotary_dim / 2);
}

void run(const RopeWrite& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) {
      auto* const x = static_cast<decltype(t)*>(a.qkv) + row * a.qkv_row;
      const int64_t line = a.position != nullptr ? a.position[row] : row;
      if (a.cos != nullptr && line >= 0)
        rotate_heads(x, a.q_heads + a.kv_heads, a.k.dim, a.cos + line * a.cos_row,
                     a.sin + line * a.sin_row, a.rotary_dim, a.interleaved);
      if (a.slot[row] < 0) continue;
      const auto* const keys = x + a.q_heads * a.k.dim;
      write_slot(a, row, keys, a.k);
      write_slot(a, row, keys + a.kv_heads * a.k.dim, a.v);
    }
  });
}

}  // namespace
}  // namespace effinfer
