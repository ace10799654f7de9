#include "ceilings/generic.h"

namespace effinfer {
namespace {

int32_t dot_loop(int64_t rounds) {
  __m256i acc[6] = {};
  __m256i u = _mm256_set1_epi8(3), s = _mm256_set1_epi8(-2);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 6; ++c) {
      asm volatile("" : "+x"(u));  // or one product would serve all chains
      acc[c] = _mm256_add_epi32(acc[c], _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
    }
  }
  __m256i all = acc[0];
  for (int c = 1; c < 6; ++c) all = _mm256_add_epi32(all, acc[c]);
  return _mm256_extract_epi32(all, 0);
}

int32_t code_loop(int64_t rounds) {
  __m256i acc[8] = {};
  __m256i u = _mm256_set1_epi8(3), s = _mm256_set1_epi8(-2);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 8; ++c) {
      asm volatile("" : "+x"(u));
      acc[c] = _mm256_add_epi16(acc[c], _mm256_maddubs_epi16(u, s));
    }
  }
  __m256i all = acc[0];
  for (int c = 1; c < 8; ++c) all = _mm256_add_epi16(all, acc[c]);
  return _mm256_extract_epi16(all, 0);
}

}  // namespace

const bench::CeilingLoops& bench::avx2_loops() {
  static const CeilingLoops loops = {read_loop,        fma_loop, dot_loop, code_loop,
                                     kChains * kLanes, 6 * 32,   8 * 32};
  return loops;
}

}  // namespace effinfer
