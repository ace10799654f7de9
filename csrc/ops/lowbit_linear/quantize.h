// Rows of x to int8 codes, their scales and the sums of their groups, over vec.h.
#pragma once
#include "base/vec.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

EFFINFER_INLINE void store_codes(int8_t* p, IVec x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)x;
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#else
  const auto bytes = __builtin_convertvector(x, int8_t __attribute__((vector_size(kLanes))));
  memcpy(p, &bytes, kLanes);
#endif
}

EFFINFER_INLINE int32_t sum_of(IVec x) {
  int32_t total = 0;
  EFFINFER_UNROLL
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// Element by element where fewer than kLanes are left.
template <class T>
EFFINFER_INLINE Vec load_some(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, left);
}

// absmax, in bits: as integers those of NaN are the largest of all.
template <class X>
uint32_t largest_magnitude(const X* x, int64_t k) {
  IVec largest = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    const IVec magnitude = bits_of(abs(load_some(x + i, k - i)));
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t most = 0;
  EFFINFER_UNROLL
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  return static_cast<uint32_t>(most);
}

// Writes the codes of a row and the sums of its groups; returns its scale.
template <class X>
float quantize_row(const X* x, int64_t k, int64_t group, int8_t* codes, int32_t* sums) {
  const uint32_t bits = largest_magnitude(x, k);
  float absmax;
  memcpy(&absmax, &bits, sizeof(absmax));
  float inverse = 127.f / absmax;
  const bool finite = bits < 0x7f800000u, usable = finite && inverse <= 3.4028235e38f;
  if (!usable) {
    for (int64_t i = 0; i < k; ++i) codes[i] = 0;
    for (int64_t g = 0; g * group < k; ++g) sums[g] = 0;
    return finite ? 0.f : absmax - absmax;  // NaN
  }
  for (int64_t begin = 0; begin < k; begin += group) {
    const int64_t end = begin + group < k ? begin + group : k;
    IVec total = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const IVec code = to_int(round(load_some(x + i, end - i) * splat(inverse)));
      total += code;
      store_codes(codes + i, code);  // past a tail it writes zeros: the row is padded
    }
    *sums++ = sum_of(total);
  }
  return absmax / 127.f;
}

// Rows that are codes already are copied beside their padding.
void copy_codes(const int8_t* x, int64_t k, int64_t group, int8_t* codes, int32_t* sums) {
  memcpy(codes, x, static_cast<size_t>(k));
  for (int64_t begin = 0; begin < k; begin += group) {
    const int64_t end = begin + group < k ? begin + group : k;
    int32_t total = 0;
    for (int64_t i = begin; i < end; ++i) total += x[i];
    *sums++ = total;
  }
}

void quantize_rows(const LowbitLinear& a, const LowbitRows& q, int64_t row, int64_t rows) {
  const int64_t k = a.io.k, group = a.weight.group;
  for (int64_t r = row; r < row + rows; ++r) {
    int8_t* const codes = q.codes + r * q.stride;
    int32_t* const sums = q.sums + r * q.groups;
    memset(codes + k, 0, static_cast<size_t>(q.stride - k));
    if (a.x_scale != nullptr) {
      copy_codes(static_cast<const int8_t*>(a.io.x) + r * a.io.x_stride, k, group, codes, sums);
      q.scale[r] = a.x_scale[r];
      continue;
    }
    with_type(a.io.x_type, [&](auto x) {
      const auto* const from = static_cast<const decltype(x)*>(a.io.x) + r * a.io.x_stride;
      q.scale[r] = quantize_row(from, k, group, codes, sums);
    });
  }
}

}  // namespace
}  // namespace effinfer
