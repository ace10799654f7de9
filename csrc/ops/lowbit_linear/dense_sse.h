// ternary_dense on x86: AVX2's kernels and AVX-512's decode its blocks alike, 16 outputs at a time.
#pragma once
#include <immintrin.h>

#include "base/vec.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

constexpr lowbit::Layout kDense = lowbit::layout(LowbitFormat::ternary_dense);

// 4 k of 16 outputs, one k after the other, into a quad.
EFFINFER_INLINE void store_quad(const __m128i (&k)[4], uint8_t* out) {
  const __m128i low01 = _mm_unpacklo_epi8(k[0], k[1]), high01 = _mm_unpackhi_epi8(k[0], k[1]);
  const __m128i low23 = _mm_unpacklo_epi8(k[2], k[3]), high23 = _mm_unpackhi_epi8(k[2], k[3]);
  auto* const to = reinterpret_cast<__m128i*>(out);
  _mm_store_si128(to, _mm_unpacklo_epi16(low01, low23));
  _mm_store_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
  _mm_store_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
  _mm_store_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
}

// Units of ternary_dense as codes of 0 to 2, a quad in 64 bytes.
inline void decode_dense(const uint8_t* w, int64_t units, uint8_t* out) {
  // The digits, -1 to 1, of 0 to 13 in balanced base 3.
  const __m128i digits[] = {_mm_setr_epi8(0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0),
                            _mm_setr_epi8(0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 0, 0),
                            _mm_setr_epi8(0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, 0, 0)};
  const __m128i nibble = _mm_set1_epi8(15), one = _mm_set1_epi8(1);
  const __m128i even = _mm_set1_epi16(0xff);
  for (int64_t u = 0; u < units; ++u, w += kDense.unit_bytes, out += kDense.unit_k / 4 * 64) {
    const auto* const words = reinterpret_cast<const __m128i*>(w + 128);
    const __m128i first = _mm_loadu_si128(words), second = _mm_loadu_si128(words + 1);
    const __m128i signs[] = {_mm_packus_epi16(first & even, second & even),
                             _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8))};
    __m128i codes[12];  // of four triples
    EFFINFER_UNROLL
    for (int t = 0; t < 16; ++t) {
      const __m128i pair = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + t / 2 * 16));
      const __m128i magnitude = (t % 2 == 0 ? pair : _mm_srli_epi16(pair, 4)) & nibble;
      const __m128i bit = _mm_set1_epi8(static_cast<char>(1 << t % 8));
      const __m128i sign = _mm_cmpeq_epi8(signs[t / 8] & bit, bit) | one;  // -1 or 1
      EFFINFER_UNROLL
      for (int d = 0; d < 3; ++d) {
        const __m128i digit = _mm_shuffle_epi8(digits[d], magnitude);
        codes[t % 4 * 3 + d] = _mm_add_epi8(_mm_sign_epi8(digit, sign), one);
      }
      if (t % 4 == 3) {
        uint8_t* const quads = out + t / 4 * 3 * 64;
        EFFINFER_UNROLL
        for (int q = 0; q < 3; ++q)
          store_quad({codes[4 * q], codes[4 * q + 1], codes[4 * q + 2], codes[4 * q + 3]},
                     quads + q * 64);
      }
    }
  }
}

}  // namespace
}  // namespace effinfer
