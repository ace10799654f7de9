// AVX2: how far 16-bit sums of products can go for the x at hand. vpmaddubsw adds the products of
// two k, and a sum of its results those of every other such pair: with codes of 0 to c it lies
// within c times what the positive x there come to, and c times what the negative ones do. The
// largest of these is a span's reach. Seldom is x so large that sums must be widened more often
// than a group ends, as they must be after 32 k of 4 bits where nothing but |x| <= 127 is known.
#pragma once
#include "ops/lowbit_linear/dot_avx2.h"

namespace effinfer {
namespace {

// |sums| of even and of odd 16-bit lanes, in lanes 0 and 1 of each half: of `up`, then of `down`.
EFFINFER_INLINE __m128i sums_of_lanes(Int up, Int down) {
  const __m128i u = _mm_add_epi16(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  const __m128i d = _mm_add_epi16(_mm256_castsi256_si128(down), _mm256_extracti128_si256(down, 1));
  const __m128i both = _mm_add_epi16(_mm_unpacklo_epi64(u, d), _mm_unpackhi_epi64(u, d));
  return _mm_abs_epi16(_mm_add_epi16(both, _mm_srli_epi64(both, 32)));
}

// Of so many rows from `row` on; q.reach is [spans, all_rows].
void measure_reach(const LowbitRows& q, int64_t k, int64_t row, int64_t rows, int64_t all_rows) {
  const Int one = bytes(1), none = _mm256_setzero_si256();
  for (int64_t r = row; r < row + rows; ++r) {
    const int8_t* x = q.codes + r * q.stride;
    uint16_t* out = q.reach + r;
    for (int64_t begin = 0; begin < k; begin += lowbit::kSpan, out += all_rows) {
      Int up = none, down = none;
      for (int64_t i = 0; i < lowbit::kSpan; i += 32, x += 32) {
        const Int codes = load_bytes(x);
        up = _mm256_add_epi16(up, _mm256_maddubs_epi16(one, _mm256_max_epi8(codes, none)));
        down = _mm256_add_epi16(down, _mm256_maddubs_epi16(one, _mm256_min_epi8(codes, none)));
      }
      const __m128i sums = sums_of_lanes(up, down);
      const __m128i most = _mm_max_epi16(sums, _mm_srli_si128(sums, 8));
      const int even = _mm_extract_epi16(most, 0), odd = _mm_extract_epi16(most, 1);
      *out = static_cast<uint16_t>(even > odd ? even : odd);
    }
  }
}

}  // namespace
}  // namespace effinfer
