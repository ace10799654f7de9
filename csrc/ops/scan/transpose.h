// Transposing small blocks in registers, shared by the vector files of the scan ops.
#pragma once
#include "base/vec.h"

namespace effinfer {
namespace {

// Lane l of `a` and of `b` after exchanging blocks of kBlock lanes between the two.
#define EFFINFER_A(l) ((l) & kBlock ? kLanes + (l) - kBlock : (l))
#define EFFINFER_B(l) ((l) & kBlock ? kLanes + (l) : (l) + kBlock)
#define EFFINFER_4(f, l) f(l), f((l) + 1), f((l) + 2), f((l) + 3)
#if defined(__AVX512F__)
#define EFFINFER_ALL(f) EFFINFER_4(f, 0), EFFINFER_4(f, 4), EFFINFER_4(f, 8), EFFINFER_4(f, 12)
#elif defined(__AVX2__)
#define EFFINFER_ALL(f) EFFINFER_4(f, 0), EFFINFER_4(f, 4)
#else
#define EFFINFER_ALL(f) EFFINFER_4(f, 0)
#endif

template <int kBlock>
EFFINFER_INLINE void exchange(Vec& a, Vec& b) {
  const Vec first = __builtin_shufflevector(a, b, EFFINFER_ALL(EFFINFER_A));
  b = __builtin_shufflevector(a, b, EFFINFER_ALL(EFFINFER_B));
  a = first;
}

#undef EFFINFER_A
#undef EFFINFER_B
#undef EFFINFER_4
#undef EFFINFER_ALL

template <int kBlock>
EFFINFER_INLINE void exchange_all(Vec (&m)[kLanes]) {
  if constexpr (kBlock < kLanes) {
    EFFINFER_UNROLL
    for (int i = 0; i < kLanes; ++i)
      if ((i & kBlock) == 0) exchange<kBlock>(m[i], m[i + kBlock]);
    exchange_all<2 * kBlock>(m);
  }
}

// m[i][j] becomes m[j][i].
EFFINFER_INLINE void transpose(Vec (&m)[kLanes]) { exchange_all<1>(m); }

// Lane i of the result: the sum of all lanes of m[i], in one fixed order.
EFFINFER_INLINE Vec sum_rows(Vec (&m)[kLanes]) {
  transpose(m);
  EFFINFER_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    EFFINFER_UNROLL
    for (int i = 0; i < half; ++i) m[i] = m[i] + m[i + half];
  }
  return m[0];
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        Vec m[kLanes];
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) m[i] = load(from + (r + i) * from_stride + c);
        transpose(m);
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, m[i]);
        continue;
      }
      for (int64_t i = r; i < r + kLanes && i < rows; ++i)
        for (int64_t j = c; j < c + kLanes && j < columns; ++j)
          to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

}  // namespace
}  // namespace effinfer
