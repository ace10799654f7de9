// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/rope_write/rope_write.h"

namespace effinfer {
namespace {

// Rotates one head; `cos` and `sin` are its row's.
template <class T>
void rotate(T* x, const float* cos, const float* sin, int64_t dim, bool interleaved) {
  using scalar::get;
  const int64_t pairs = dim / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t i = interleaved ? 2 * p : p, j = interleaved ? 2 * p + 1 : p + pairs;
    const float first = get(x + i), second = get(x + j);
    scalar::put(x + i, first * cos[i] - second * sin[i]);
    scalar::put(x + j, second * cos[j] + first * sin[j]);
  }
}

template <class T, class P>
void write(const T* x, int64_t heads, const WrittenPages& pages, P* to) {
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < pages.dim; ++d)
      scalar::put(to + h * pages.head_stride + d * pages.dim_stride,
                  scalar::get(x + h * pages.dim + d));
}

template <class T>
void write_slot(const RopeWrite& a, int64_t row, const T* x, const WrittenPages& pages) {
  const int64_t plane = a.plane != nullptr ? a.plane[row] : 0, slot = a.slot[row];
  const int64_t at = plane * pages.plane_stride + slot / a.block_size * pages.block_stride +
                     slot % a.block_size * pages.slot_stride;
  with_type(pages.type, [&](auto p) {
    write(x, a.kv_heads, pages, static_cast<decltype(p)*>(pages.data) + at);
  });
}

}  // namespace

void rope_write_scalar(const RopeWrite& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto t) {
    for (int64_t row = begin; row < end; ++row) {
      auto* const x = static_cast<decltype(t)*>(a.qkv) + row * a.qkv_row;
      const int64_t line = a.position != nullptr ? a.position[row] : row;
      if (a.cos != nullptr && line >= 0)
        for (int64_t h = 0; h < a.q_heads + a.kv_heads; ++h)
          rotate(x + h * a.k.dim, a.cos + line * a.cos_row, a.sin + line * a.sin_row, a.rotary_dim,
                 a.interleaved);
      if (a.slot[row] < 0) continue;
      const auto* const keys = x + a.q_heads * a.k.dim;
      write_slot(a, row, keys, a.k);
      write_slot(a, row, keys + a.kv_heads * a.k.dim, a.v);
    }
  });
}

}  // namespace effinfer
