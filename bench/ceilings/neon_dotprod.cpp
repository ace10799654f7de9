#include "ceilings/generic.h"

namespace effinfer {
namespace {

int32_t dot_loop(int64_t rounds) {
  int32x4_t acc[8] = {};
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 8; ++c) {
      asm volatile("" : "+w"(a));  // or one product would serve all chains
      acc[c] = vdotq_s32(acc[c], a, b);
    }
  }
  int32x4_t all = acc[0];
  for (int c = 1; c < 8; ++c) all = vaddq_s32(all, acc[c]);
  return vaddvq_s32(all);
}

}  // namespace

const bench::CeilingLoops& bench::neon_dotprod_loops() {
  static const CeilingLoops loops = {read_loop,        fma_loop, dot_loop, dot_loop,
                                     kChains * kLanes, 8 * 16,   8 * 16};
  return loops;
}

}  // namespace effinfer
