#include "ceilings/generic.h"

namespace effinfer {
namespace {

int32_t dot_loop(int64_t rounds) {
  int32x4_t acc[6] = {};
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 6; ++c) {
      asm volatile("" : "+w"(a));  // or one product would serve all chains
      int16x8_t product = vmull_s8(vget_low_s8(a), vget_low_s8(b));
      product = vmlal_s8(product, vget_high_s8(a), vget_high_s8(b));
      acc[c] = vpadalq_s16(acc[c], product);
    }
  }
  int32x4_t all = acc[0];
  for (int c = 1; c < 6; ++c) all = vaddq_s32(all, acc[c]);
  return vaddvq_s32(all);
}

int32_t code_loop(int64_t rounds) {
  int16x8_t acc[8] = {};
  int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < 8; ++c) {
      asm volatile("" : "+w"(a));
      acc[c] = vmlal_s8(acc[c], vget_low_s8(a), vget_low_s8(b));
      acc[c] = vmlal_s8(acc[c], vget_high_s8(a), vget_high_s8(b));
    }
  }
  int16x8_t all = acc[0];
  for (int c = 1; c < 8; ++c) all = vaddq_s16(all, acc[c]);
  return vaddvq_s16(all);
}

}  // namespace

const bench::CeilingLoops& bench::neon_loops() {
  static const CeilingLoops loops = {read_loop,        fma_loop, dot_loop, code_loop,
                                     kChains * kLanes, 6 * 16,   8 * 16};
  return loops;
}

}  // namespace effinfer
