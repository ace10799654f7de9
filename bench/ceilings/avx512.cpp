#include "ceilings/generic.h"

namespace effinfer {
namespace {

int32_t dot_loop(int64_t rounds) {
  __m512i acc[6] = {};
  __m512i u = _mm512_set1_epi8(3), s = _mm512_set1_epi8(-2);
  const __m512i ones = _mm512_set1_epi16(1);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 6; ++c) {
      asm volatile("" : "+v"(u));  // or one product would serve all chains
      acc[c] = _mm512_add_epi32(acc[c], _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), ones));
    }
  }
  __m512i all = acc[0];
  for (int c = 1; c < 6; ++c) all = _mm512_add_epi32(all, acc[c]);
  return _mm512_reduce_add_epi32(all);
}

int32_t code_loop(int64_t rounds) {
  __m512i acc[8] = {};
  __m512i u = _mm512_set1_epi8(3), s = _mm512_set1_epi8(-2);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 8; ++c) {
      asm volatile("" : "+v"(u));
      acc[c] = _mm512_add_epi16(acc[c], _mm512_maddubs_epi16(u, s));
    }
  }
  __m512i all = acc[0];
  for (int c = 1; c < 8; ++c) all = _mm512_add_epi16(all, acc[c]);
  return _mm512_reduce_add_epi32(all);
}

}  // namespace

const bench::CeilingLoops& bench::avx512_loops() {
  static const CeilingLoops loops = {read_loop,        fma_loop, dot_loop, code_loop,
                                     kChains * kLanes, 6 * 64,   8 * 64};
  return loops;
}

}  // namespace effinfer
