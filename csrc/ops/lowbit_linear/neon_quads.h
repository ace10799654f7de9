// Packed weights in NEON registers. Included by neon*.cpp only.
#pragma once
#include <arm_neon.h>

#include "base/vec.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

// Four consecutive k of a panel: register j has outputs 4j to 4j + 3, four bytes each: codes, of
// binary twice the code, of int8 and ternary_dense the value.
struct Quad {
  uint8x16_t v[4];
};

EFFINFER_INLINE Quad load_quad(const uint8_t* p) {
  return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}

EFFINFER_INLINE uint8x16_t shift_right(uint8x16_t x, int at) {
  return x >> vdupq_n_u8(static_cast<uint8_t>(at));
}

// kBits of every byte, from bit `at` on.
template <int kBits>
EFFINFER_INLINE Quad take_bits(const Quad& q, int at) {
  Quad out;
  EFFINFER_UNROLL
  for (int j = 0; j < 4; ++j) {
    out.v[j] = shift_right(q.v[j], at);
    if (at + kBits < 8) out.v[j] &= vdupq_n_u8((1 << kBits) - 1);
  }
  return out;
}

// Bits `at` to `at + 3` of 16 outputs' bytes as four bytes of 0 or 2 each.
EFFINFER_INLINE Quad spread_bits(uint8x16_t bytes, int at) {
  const uint8x16_t first = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t bit = vreinterpretq_u8_u32(vdupq_n_u32(0x08040201u << at));
  Quad out;
  EFFINFER_UNROLL
  for (int j = 0; j < 4; ++j)
    out.v[j] = vtstq_u8(vqtbl1q_u8(bytes, first + static_cast<uint8_t>(4 * j)), bit) & 2;
  return out;
}

// Four k, 16 outputs each, put side by side.
EFFINFER_INLINE Quad interleave(const uint8x16_t* k) {
  const uint8x16_t low01 = vzip1q_u8(k[0], k[1]), high01 = vzip2q_u8(k[0], k[1]);
  const uint8x16_t low23 = vzip1q_u8(k[2], k[3]), high23 = vzip2q_u8(k[2], k[3]);
  const auto both = [](uint8x16_t a, uint8x16_t b, bool high) __attribute__((always_inline)) {
    const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
    return vreinterpretq_u8_u16(high ? vzip2q_u16(x, y) : vzip1q_u16(x, y));
  };
  return {{both(low01, low23, false), both(low01, low23, true), both(high01, high23, false),
           both(high01, high23, true)}};
}

// The digits of one triple of ternary_dense, as values, of magnitudes that may be negative.
EFFINFER_INLINE void digits(uint8x16_t magnitude, uint8x16_t negative, uint8x16_t* out) {
  // Of 0 to 13: the digit of 9, of 3 and of 1.
  constexpr uint8_t m = 0xff;
  const uint8x16_t nines = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0};
  const uint8x16_t threes = {0, 0, 1, 1, 1, m, m, m, 0, 0, 0, 1, 1, 1, 0, 0};
  const uint8x16_t ones = {0, 1, m, 0, 1, m, 0, 1, m, 0, 1, m, 0, 1, 0, 0};
  const uint8x16_t table[] = {nines, threes, ones};
  EFFINFER_UNROLL
  for (int d = 0; d < 3; ++d) out[d] = (vqtbl1q_u8(table[d], magnitude) ^ negative) - negative;
}

// Three quads from triples `triple` to `triple + 3` of a ternary_dense unit.
template <class Use>
EFFINFER_INLINE void dense_quads(const uint8_t* unit, int triple, const Use& use) {
  const uint16x8_t signs[] = {vld1q_u16(reinterpret_cast<const uint16_t*>(unit + 128)),
                              vld1q_u16(reinterpret_cast<const uint16_t*>(unit + 144))};
  uint8x16_t k[12];
  EFFINFER_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint16x8_t bit = vdupq_n_u16(static_cast<uint16_t>(1 << (triple + i)));
    const uint8x16_t negative = vuzp1q_u8(vreinterpretq_u8_u16(vtstq_u16(signs[0], bit)),
                                          vreinterpretq_u8_u16(vtstq_u16(signs[1], bit)));
    const uint8x16_t two = vld1q_u8(unit + (triple + i) / 2 * 16);
    digits(i % 2 == 0 ? two & 15 : two >> 4, negative, k + 3 * i);
  }
  EFFINFER_UNROLL
  for (int i = 0; i < 3; ++i) use(triple / 4 * 3 + i, interleave(k + 4 * i));
}

// use(part, quad) for k = 4 part .. 4 part + 3 of a unit, in ascending order.
template <LowbitFormat F, class Use>
EFFINFER_INLINE void each_quad(const uint8_t* unit, const Use& use) {
  if constexpr (F == LowbitFormat::int8) {
    use(0, load_quad(unit));
  } else if constexpr (F == LowbitFormat::int4) {
    const Quad both = load_quad(unit);
    use(0, take_bits<4>(both, 0));
    use(1, take_bits<4>(both, 4));
  } else if constexpr (F == LowbitFormat::int3) {
    const Quad high = load_quad(unit + 128);
    EFFINFER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Quad low = load_quad(unit + 64 * half);
      EFFINFER_UNROLL
      for (int part = 0; part < 4; ++part) {
        Quad codes;
        EFFINFER_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint8x16_t two = shift_right(low.v[j], 2 * part);
          const uint8x16_t third = shift_right(high.v[j], 4 * half + part);
          codes.v[j] = vsliq_n_u8(two, third, 2) & vdupq_n_u8(7);
        }
        use(4 * half + part, codes);
      }
    }
  } else if constexpr (F == LowbitFormat::binary) {
    EFFINFER_UNROLL
    for (int part = 0; part < 8; ++part)
      use(part, spread_bits(vld1q_u8(unit + part / 2 * 16), part % 2 * 4));
  } else if constexpr (F == LowbitFormat::ternary_dense) {
    EFFINFER_UNROLL
    for (int triple = 0; triple < 16; triple += 4) dense_quads(unit, triple, use);
  } else {
    const Quad all = load_quad(unit);
    EFFINFER_UNROLL
    for (int part = 0; part < 4; ++part) use(part, take_bits<2>(all, 2 * part));
  }
}

}  // namespace
}  // namespace effinfer
