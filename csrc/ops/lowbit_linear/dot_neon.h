// Integer sums of a panel times rows of int8 codes on NEON: by smmla where the CPU has i8mm, else
// by sdot, else by smull and smlal. What int8.h asks for. Included by neon*.cpp only.
#pragma once
#include "ops/lowbit_linear/group.h"
#include "ops/lowbit_linear/neon_quads.h"

// gcc 12 would hoist loads over the products until sums spill: 40 moves to and from the stack in
// smmla's tile, where this leaves two.
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")

namespace effinfer {
namespace {

constexpr int kDirectRows = 1;
constexpr int64_t kQuadBytes = 64;
constexpr int kLargestX = 127;

EFFINFER_INLINE int8x16_t as_signed(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
EFFINFER_INLINE int8x16_t load_bytes(const void* p) {
  return vld1q_s8(static_cast<const int8_t*>(p));
}
EFFINFER_INLINE int8x16_t four_of(const int8_t* x) {  // four times over
  return vreinterpretq_s8_s32(vld1q_dup_s32(reinterpret_cast<const int32_t*>(x)));
}

// ---- decoded blocks -----------------------------------------------------------------------------

// Units of 16 k: quads, one after the other; for smmla pairs of quads, two outputs' eight k in 16
// bytes.
struct DecodedCodes {
  static constexpr int kUnitK = 16, kUnitBytes = 4 * kQuadBytes, kStep = 1;
  static constexpr bool kDecodes = false;
};

EFFINFER_INLINE void store_pair(uint8_t* out, const Quad& even, const Quad& odd) {
  EFFINFER_UNROLL
  for (int j = 0; j < 4; ++j) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const uint32x4_t a = vreinterpretq_u32_u8(even.v[j]), b = vreinterpretq_u32_u8(odd.v[j]);
    vst1q_u8(out + 32 * j, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
    vst1q_u8(out + 32 * j + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
#else
    vst1q_u8(out + 16 * j, even.v[j]);
    vst1q_u8(out + kQuadBytes + 16 * j, odd.v[j]);
#endif
  }
}

// A packed format.
template <LowbitFormat F>
struct Packed {
  static constexpr lowbit::Layout kLayout = lowbit::layout(F);
  static constexpr int kUnitK = kLayout.unit_k, kUnitBytes = kLayout.unit_bytes;
  static constexpr bool kValues = F == LowbitFormat::int8 || F == LowbitFormat::ternary_dense;
  static constexpr int kStep = 1, kCentre = kValues ? 0 : kLayout.centre;
  static constexpr int kDirectRows = effinfer::kDirectRows;
  static constexpr bool kDecodes = true;
  static constexpr int kLargest = F == LowbitFormat::int8 ? 128 : kLayout.step * kLayout.max_code;
  using Decoded = DecodedCodes;

  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* unit, const Use& use) {
    each_quad<F>(unit, use);
  }

  static void decode(const uint8_t* w, int64_t units, uint8_t* out) {
    if constexpr (kUnitK == 4) {  // an odd last unit stands in for the one that it lacks: x is 0
      for (; units > 0; units -= 2, w += 2 * kUnitBytes, out += 2 * kQuadBytes)
        store_pair(out, load_quad(w), load_quad(w + (units > 1 ? kUnitBytes : 0)));
    } else {
      for (; units > 0; --units, w += kUnitBytes, out += kUnitK / 4 * kQuadBytes) {
        Quad even;
        each_quad<F>(w, [&](int q, const Quad& codes) __attribute__((always_inline)) {
          if (q % 2 == 0)
            even = codes;
          else
            store_pair(out + q / 2 * 2 * kQuadBytes, even, codes);
        });
      }
    }
  }
};

// ---- one row: weights are decoded as they are read ----------------------------------------------

#if defined(__ARM_FEATURE_DOTPROD)

template <class F>
__attribute__((noinline)) void dot_row(const uint8_t* w, const int8_t* x, int64_t units,
                                       const Sink& sink) {
  int32x4_t sum[2][4] = {};  // two chains each: sdot takes longer than its turn
  const auto unit = [&](int odd) __attribute__((always_inline)) {
    F::quads(w, [&](int q, const Quad& codes) __attribute__((always_inline)) {
      const int8x16_t four = four_of(x + 4 * q);
      EFFINFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        int32x4_t& to = sum[(q + odd) % 2][j];
        to = vdotq_s32(to, as_signed(codes.v[j]), four);
      }
    });
    w += F::kUnitBytes;
    x += F::kUnitK;
  };
  if constexpr (F::kUnitK == 4) {  // one quad a unit
    for (; units >= 2; units -= 2) {
      unit(0);
      unit(1);
    }
  }
  for (; units > 0; --units) unit(0);
  IVec sums[1][kVecs];
  EFFINFER_UNROLL
  for (int j = 0; j < 4; ++j) sums[0][j] = vaddq_s32(sum[0][j], sum[1][j]);
  sink.take<1, F::kStep>(sums);
}

#else

// A unit's products are added up in 16 bits.
template <class F>
__attribute__((noinline)) void dot_row(const uint8_t* w, const int8_t* x, int64_t units,
                                       const Sink& sink) {
  static_assert(F::kUnitK / 4 * F::kLargest * kLargestX <= INT16_MAX);
  int32x4_t sum[8] = {};  // two of an output
  for (; units > 0; --units, w += F::kUnitBytes, x += F::kUnitK) {
    int16x8_t products[8];
    F::quads(w, [&](int q, const Quad& codes) __attribute__((always_inline)) {
      const int8x16_t four = four_of(x + 4 * q);
      const int8x8_t half = vget_low_s8(four);
      EFFINFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int8x16_t a = as_signed(codes.v[j]);
        int16x8_t &low = products[2 * j], &high = products[2 * j + 1];
        low = q == 0 ? vmull_s8(vget_low_s8(a), half) : vmlal_s8(low, vget_low_s8(a), half);
        high = q == 0 ? vmull_high_s8(a, four) : vmlal_high_s8(high, a, four);
      }
    });
    EFFINFER_UNROLL
    for (int j = 0; j < 8; ++j) sum[j] = vpadalq_s16(sum[j], products[j]);
  }
  IVec sums[1][kVecs];
  EFFINFER_UNROLL
  for (int j = 0; j < 4; ++j) sums[0][j] = vpaddq_s32(sum[2 * j], sum[2 * j + 1]);
  sink.take<1, F::kStep>(sums);
}

#endif

// ---- several rows times a decoded block ---------------------------------------------------------

#if defined(__ARM_FEATURE_MATMUL_INT8)

constexpr int kTileRows = 6;

// Two outputs of two rows in a register; the last of an odd number of rows is computed twice.
template <int R>
__attribute__((noinline)) void tile(const uint8_t* w, const int8_t* x, int64_t stride,
                                    int64_t turns, const Sink& sink) {
  constexpr int kPairs = (R + 1) / 2;
  int32x4_t sum[kPairs][8] = {};
  for (; turns > 0; --turns, x += DecodedCodes::kUnitK) {
    int64x2_t first[kPairs], second[kPairs];
    EFFINFER_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      const int8_t* const even = x + 2 * p * stride;
      first[p] = vreinterpretq_s64_s8(load_bytes(even));
      second[p] = vreinterpretq_s64_s8(load_bytes(2 * p + 1 < R ? even + stride : even));
    }
    EFFINFER_UNROLL
    for (int half = 0; half < 2; ++half) {
      int8x16_t codes[kPairs];
      EFFINFER_UNROLL
      for (int p = 0; p < kPairs; ++p)
        codes[p] = vreinterpretq_s8_s64(half == 0 ? vzip1q_s64(first[p], second[p])
                                                  : vzip2q_s64(first[p], second[p]));
      EFFINFER_UNROLL
      for (int j = 0; j < 8; ++j, w += 16) {
        const int8x16_t outputs = load_bytes(w);
        EFFINFER_UNROLL
        for (int p = 0; p < kPairs; ++p) sum[p][j] = vmmlaq_s32(sum[p][j], outputs, codes[p]);
      }
    }
  }
  IVec sums[R][kVecs];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int32x4_t a = sum[r / 2][2 * j], b = sum[r / 2][2 * j + 1];
      sums[r][j] = r % 2 == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b);
    }
  }
  sink.take<R, DecodedCodes::kStep>(sums);
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int kTileRows = 4;

template <int I>
struct Index {
  static constexpr int value = I;
};

template <int R>
__attribute__((noinline)) void tile(const uint8_t* w, const int8_t* x, int64_t stride,
                                    int64_t turns, const Sink& sink) {
  IVec sum[R][kVecs] = {};
  for (; turns > 0; --turns, x += DecodedCodes::kUnitK) {
    int8x16_t codes[R];
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) codes[r] = load_bytes(x + r * stride);
    const auto quad = [&](auto lane) __attribute__((always_inline)) {
      EFFINFER_UNROLL
      for (int j = 0; j < 4; ++j, w += 16) {
        const int8x16_t outputs = load_bytes(w);
        EFFINFER_UNROLL
        for (int r = 0; r < R; ++r)
          sum[r][j] = vdotq_laneq_s32(sum[r][j], outputs, codes[r], lane.value);
      }
    };
    quad(Index<0>());
    quad(Index<1>());
    quad(Index<2>());
    quad(Index<3>());
  }
  sink.take<R, DecodedCodes::kStep>(sum);
}

#else

constexpr int kTileRows = 2;
static_assert(2 * 128 * kLargestX <= INT16_MAX);  // products added up in 16 bits

template <int R>
__attribute__((noinline)) void tile(const uint8_t* w, const int8_t* x, int64_t stride,
                                    int64_t turns, const Sink& sink) {
  int32x4_t sum[R][8] = {};
  for (int64_t pairs = 2 * turns; pairs > 0; --pairs, x += 8, w += 2 * kQuadBytes) {
    int8x8_t even[R], odd[R];
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      even[r] = vget_low_s8(four_of(x + r * stride));
      odd[r] = vget_low_s8(four_of(x + r * stride + 4));
    }
    EFFINFER_UNROLL
    for (int j = 0; j < 8; ++j) {
      const int8x8_t a = vreinterpret_s8_u8(vld1_u8(w + 8 * j));
      const int8x8_t b = vreinterpret_s8_u8(vld1_u8(w + kQuadBytes + 8 * j));
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r)
        sum[r][j] = vpadalq_s16(sum[r][j], vmlal_s8(vmull_s8(a, even[r]), b, odd[r]));
    }
  }
  IVec sums[R][kVecs];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int j = 0; j < 4; ++j) sums[r][j] = vpaddq_s32(sum[r][2 * j], sum[r][2 * j + 1]);
  }
  sink.take<R, DecodedCodes::kStep>(sums);
}

#endif

template <class F, int R>
EFFINFER_INLINE void dot(const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t units,
                         const Sink& sink) {
  if constexpr (F::kDecodes) {
    static_assert(R == 1);
    dot_row<F>(w, x, units, sink);
  } else {
    tile<R>(w, x, x_stride, units, sink);
  }
}

}  // namespace
}  // namespace effinfer

#pragma GCC pop_options
