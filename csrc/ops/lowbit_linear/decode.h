// Packed codes to float32 weights over vec.h: outputs are lanes, four consecutive k at a time.
//
// w = scale * float(value - zero), + offset, each step rounded to float32 as the contract says, but
// in fewer steps. The four k of one output are the bytes of a 32-bit lane, so `value - zero` of all
// four is one byte-wise subtraction. A byte d alone at the top of its lane is the integer d * 2^24:
// it needs no sign extension, converts exactly (8 significant bits), and times scale * 2^-24 it has
// the very product d * scale, so it rounds to the same float32, infinities and NaNs included,
// provided that scale * 2^-24 is exact. That holds for every f16, and for every float32 and bf16 of
// at least kLeastFolded; with smaller ones the 2^-24 is multiplied by apart.
#pragma once
#include "base/vec.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;
using linear_layout::kTerms;

constexpr int kVecsOfPanel = static_cast<int>(kPanel) / kLanes;
constexpr float kTopByte = 16777216.f;                   // 2^24
constexpr float kLeastFolded = 1.9721522630525295e-31f;  // 2^-102: 2^-24 of it is normal

// What turns a group's codes into weights, for the outputs of one vector.
struct Affine {
  Vec scale, offset;  // binary: the weights of codes 1 and 0
  IVec zeros;         // in every byte
  Vec wide_zero;      // times 2^24
};

EFFINFER_INLINE Vec load_as(const void* p, DType type, int64_t at) {
  switch (type) {
    case DType::f32:
      return load(static_cast<const float*>(p) + at);
    case DType::bf16:
      return load(static_cast<const bf16*>(p) + at);
    case DType::f16:
      return load(static_cast<const f16*>(p) + at);
  }
  return Vec{};
}

EFFINFER_INLINE IVec load_words(const uint8_t* p) {
  return bits_of(load(reinterpret_cast<const float*>(p)));
}

EFFINFER_INLINE IVec in_each_byte(IVec x) { return x * splat_i(0x01010101); }

// The kinds of codes there are to tell apart. int8 with a zero is one, for value - zero has 9 bits
// there; a format's centre is none (ternary decodes as two bits).
enum class Codes { eight, eight_with_zero, four, three, two, one };

template <Codes kCodes, bool kOffset, bool kFolded>
struct Decoder {
  using Coefficients = Affine;
  static constexpr int unit_k = kCodes == Codes::four                            ? 8
                                : kCodes == Codes::two                           ? 16
                                : kCodes == Codes::three || kCodes == Codes::one ? 32
                                                                                 : 4;
  static constexpr int unit_bytes = kCodes == Codes::three ? 192 : 64;

  // For the outputs whose scale is element `at`.
  EFFINFER_INLINE static Affine affine(const LowbitWeight& w, int64_t at) {
    Affine a = {};
    a.scale = load_as(w.scale, w.scale_type, at);
    if (kOffset) a.offset = load_as(w.offset, w.scale_type, at);
    if constexpr (kCodes == Codes::one) {
      const Vec minus = -a.scale;
      a.scale = kOffset ? a.scale + a.offset : a.scale;
      a.offset = kOffset ? minus + a.offset : minus;
      return a;
    }
    if (kFolded) a.scale *= splat(1 / kTopByte);
    const int centre = lowbit::layout(w.format).centre;
    const IVec zero = w.zero != nullptr ? load_u8(w.zero + at) : splat_i(centre);
    a.zeros = in_each_byte(zero);
    a.wide_zero = to_float(zero - splat_i(centre)) * splat(kTopByte);
    return a;
  }

  EFFINFER_INLINE static IVec three_bits(const uint8_t* words, int q) {
    const IVec low = load_words(words + q / 4 * 64) >> 2 * (q % 4) & splat_i(0x03030303);
    return low | (load_words(words + 128) >> q & splat_i(0x01010101)) << 2;
  }

  // The q-th four k of a unit, for its outputs from `v` vectors on: what weight() takes apart.
  EFFINFER_INLINE static IVec bits(const uint8_t* unit, int q, int v, const Affine& a) {
    if constexpr (kCodes == Codes::one)
      return load_u8(unit + q / 2 * kPanel + v * kLanes) << (28 - q % 2 * 4);
    return codes_of(unit + v * kLanes * 4, q, a.zeros);
  }

  // The weights of the i-th of four k.
  template <int i>
  EFFINFER_INLINE static Vec weight(IVec bits, const Affine& a) {
    if constexpr (kCodes == Codes::one) {
      return select_negative(from_bits(bits << (3 - i)), a.scale, a.offset);
    } else {
      Vec x = to_float(top_byte<i>(bits));
      if (kCodes == Codes::eight_with_zero) x -= a.wide_zero;
      if (!kFolded) x *= splat(1 / kTopByte);
      x *= a.scale;
      return kOffset ? rounded(x) + a.offset : x;
    }
  }

 private:
  // value - zero, as signed bytes; int8's before its zero.
  EFFINFER_INLINE static IVec codes_of(const uint8_t* words, int q, IVec zeros) {
    if constexpr (kCodes == Codes::four)
      return subtract_bytes(load_words(words) >> 4 * q & splat_i(0x0f0f0f0f), zeros);
    if constexpr (kCodes == Codes::two)
      return subtract_bytes(load_words(words) >> 2 * q & splat_i(0x03030303), zeros);
    if constexpr (kCodes == Codes::three) return subtract_bytes(three_bits(words, q), zeros);
    return load_words(words);
  }
};

// Fewer steps still for codes of up to four bits with 16-bit scales: code i stays in byte i of its
// lane, converts to c * 2^8i, and fma(c * 2^8i, scale * 2^-8i, -zero * scale) is w. For scale has
// at most 11 significant bits and value - zero at most 5, so that -zero * scale and w are exact,
// and what is exact rounds to itself, wherever scale is as `fuses` wants it.
struct Fused {
  Vec scale[4];  // times 2^-8i
  Vec base;      // -zero * scale
  Vec offset;
};

constexpr float kMostFused = 6.646139978924579e35f;  // 2^119: 15 times as much is finite

// Where every step is exact: finite scales, bf16's not too near the ends.
EFFINFER_INLINE IVec fuses(Vec scale) {
  const Vec size = abs(scale);
  return (~(size < splat(kLeastFolded)) & (size < splat(kMostFused))) | (scale == Vec{});
}

template <Codes kCodes, bool kOffset>
struct FusedDecoder {
  using Coefficients = Fused;
  using Plain = Decoder<kCodes, kOffset, true>;
  static constexpr int unit_k = Plain::unit_k, unit_bytes = Plain::unit_bytes;

  EFFINFER_INLINE static Fused affine(const LowbitWeight& w, int64_t at) {
    Fused f = {};
    const Vec scale = load_as(w.scale, w.scale_type, at);
    f.scale[0] = scale;
    f.scale[1] = scale * splat(0x1p-8f);
    f.scale[2] = scale * splat(0x1p-16f);
    f.scale[3] = scale * splat(0x1p-24f);
    const int centre = lowbit::layout(w.format).centre;
    f.base = -to_float(w.zero != nullptr ? load_u8(w.zero + at) : splat_i(centre)) * scale;
    if (kOffset) f.offset = load_as(w.offset, w.scale_type, at);
    return f;
  }

  EFFINFER_INLINE static IVec bits(const uint8_t* unit, int q, int v, const Fused&) {
    const uint8_t* const words = unit + v * kLanes * 4;
    if constexpr (kCodes == Codes::four) return load_words(words) >> 4 * q;
    if constexpr (kCodes == Codes::two) return load_words(words) >> 2 * q;
    return Plain::three_bits(words, q);
  }

  template <int i>
  EFFINFER_INLINE static Vec weight(IVec bits, const Fused& f) {
    constexpr int kMask = kCodes == Codes::four ? 15 : kCodes == Codes::two ? 3 : 7;
    const Vec x = fma(to_float(bits & splat_i(kMask << 8 * i)), f.scale[i], f.base);
    return kOffset ? x + f.offset : x;
  }
};

// Terms begin to begin + terms of k for panels side by side.
struct PackedBlock {
  const LowbitWeight* weight;
  int64_t panel, begin, terms;
};

// Calls f(unit, first k, its end, group) for each group's part of a block; `unit` is the first
// panel's. Both a block and a group begin with a unit.
template <class D, class F>
EFFINFER_INLINE void each_group(const PackedBlock& b, F&& f) {
  const LowbitWeight& w = *b.weight;
  const uint8_t* const packed = w.packed + b.panel * w.panel_stride;
  const int64_t end = b.begin + b.terms;
  int64_t group = b.begin / w.group, next = (group + 1) * w.group;
  for (int64_t k = b.begin; k < end; ++group, next += w.group) {
    const int64_t stop = next < end ? next : end;
    f(packed + k / D::unit_k * D::unit_bytes, k, stop, group);
    k = stop;
  }
}

// out [terms, 16] = a panel's weights; whole units, so up to unit_k - 1 terms more.
template <class D>
__attribute__((noinline)) void decode(const PackedBlock& b, float* out) {
  const LowbitWeight w = *b.weight;
  const int64_t panel = b.panel;
  each_group<D>(b, [&](const uint8_t* unit, int64_t k, int64_t end,
                       int64_t group) __attribute__((always_inline)) {
    Affine affine[kVecsOfPanel];
    EFFINFER_UNROLL
    for (int v = 0; v < kVecsOfPanel; ++v)
      affine[v] = D::affine(w, panel * w.scale_stride + group * kPanel + v * kLanes);
    for (; k < end; k += D::unit_k, unit += D::unit_bytes, out += D::unit_k * kPanel) {
      EFFINFER_UNROLL
      for (int q = 0; q < D::unit_k / 4; ++q) {
        EFFINFER_UNROLL
        for (int v = 0; v < kVecsOfPanel; ++v) {
          const IVec bits = D::bits(unit, q, v, affine[v]);
          float* const at = out + 4 * q * kPanel + v * kLanes;
          store(at, D::template weight<0>(bits, affine[v]));
          store(at + kPanel, D::template weight<1>(bits, affine[v]));
          store(at + 2 * kPanel, D::template weight<2>(bits, affine[v]));
          store(at + 3 * kPanel, D::template weight<3>(bits, affine[v]));
        }
      }
    }
  });
}

}  // namespace
}  // namespace effinfer
