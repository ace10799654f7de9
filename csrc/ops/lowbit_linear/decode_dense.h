// ternary_dense to float32 weights over vec.h: outputs are lanes, three consecutive k at a time.
#pragma once
#include "ops/lowbit_linear/decode.h"

namespace effinfer {
namespace {

constexpr int kDenseTriples = 16;  // of a unit

// 0 <= x < 27
EFFINFER_INLINE IVec third(IVec x) { return x * splat_i(171) >> 9; }

// out [terms, 16] = a panel's weights; a block need not begin with a unit.
template <bool kOffset>
__attribute__((noinline)) void decode_dense(const PackedBlock& b, float* out) {
  constexpr lowbit::Layout kUnit = lowbit::layout(LowbitFormat::ternary_dense);
  static_assert(kUnit.unit_k == 3 * kDenseTriples);
  const LowbitWeight w = *b.weight;
  const int64_t begin = b.begin, end = b.begin + b.terms, scale_at = b.panel * w.scale_stride;
  int64_t k = begin / kUnit.unit_k * kUnit.unit_k;
  const uint8_t* unit =
      w.packed + b.panel * w.panel_stride + begin / kUnit.unit_k * kUnit.unit_bytes;
  for (; k < end; k += kUnit.unit_k, unit += kUnit.unit_bytes) {
    for (int v = 0; v < kVecsOfPanel; ++v) {
      const int64_t lanes = v * kLanes;
      const Vec scale = load_as(w.scale, w.scale_type, scale_at + lanes);
      const Vec offset = kOffset ? load_as(w.offset, w.scale_type, scale_at + lanes) : Vec{};
      const IVec zero = w.zero != nullptr ? load_u8(w.zero + scale_at + lanes) : splat_i(1);
      const IVec signs = load_u16(unit + 8 * kPanel + 2 * lanes);
      for (int t = 0; t < kDenseTriples; ++t) {
        const IVec magnitude = load_u8(unit + t / 2 * kPanel + lanes) >> (t % 2 * 4) & splat_i(15);
        const IVec minus = -(signs >> t & splat_i(1));
        // Base 3, each digit its code; the first is the highest.
        const IVec all = ((magnitude ^ minus) - minus) + splat_i(13);
        const IVec upper = third(all), first = third(upper);
        const IVec digits[3] = {first, upper - first * splat_i(3), all - upper * splat_i(3)};
        for (int i = 0; i < 3; ++i) {
          const int64_t at = k + 3 * t + i;
          if (at < begin || at >= end) continue;
          const Vec product = scale * to_float(digits[i] - zero);
          store(out + (at - begin) * kPanel + lanes, kOffset ? rounded(product) + offset : product);
        }
      }
    }
  }
}

}  // namespace
}  // namespace effinfer
