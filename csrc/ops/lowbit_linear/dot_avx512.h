// 512-bit vectors: a quad, four consecutive k of a panel's 16 outputs, is one of them, and vpdpbusd
// multiplies it by four codes of x and adds, exactly. Everything is GCC's vectors but two
// functions, spread_bits and add_products, which have a body in plain C++ for tests where there is
// no AVX-512.
#pragma once
#include "ops/lowbit_linear/dense_sse.h"
#include "ops/lowbit_linear/group.h"

namespace effinfer {
namespace {

constexpr int kDirectRows = 4;
constexpr int kTileRows = 6;
constexpr int64_t kQuadBytes = 64;

typedef uint8_t Quad __attribute__((vector_size(64)));
typedef uint8_t QuadAny __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint32_t QuadWords __attribute__((vector_size(64)));
typedef int32_t Sums __attribute__((vector_size(64)));

EFFINFER_INLINE Quad load_quad(const uint8_t* p) { return *reinterpret_cast<const QuadAny*>(p); }
EFFINFER_INLINE Quad bytes(uint32_t x) { return (Quad)(QuadWords{} + x * 0x01010101u); }
template <int n>
EFFINFER_INLINE Quad shift_right(Quad x) {  // what comes in from the next byte is to be masked
  return (Quad)((QuadWords)x >> n);
}
template <int n>
EFFINFER_INLINE Quad shift_left(Quad x) {
  return (Quad)((QuadWords)x << n);
}

// Bits `first` to `first + 3` of 16 bytes, as four bytes of 0 or 1 each.
template <int first>
EFFINFER_INLINE Quad spread_bits(const uint8_t* p) {
#if defined(__AVX512BW__)
  const __m512i sixteen =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i from =
      _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a,
                       0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                       0x03030303, 0x02020202, 0x01010101, 0);
  const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x08040201u << first));
  const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(sixteen, from), bit);
  return (Quad)_mm512_maskz_set1_epi8(set, 1);
#else
  Quad out;
  for (int i = 0; i < 64; ++i) out[i] = p[i / 4] >> (first + i % 4) & 1;
  return out;
#endif
}

// sums[output] += its four bytes of w times the four codes at x.
EFFINFER_INLINE void add_products(Sums& sums, Quad w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  int32_t four;
  memcpy(&four, x, sizeof(four));
  sums = (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
#else
  for (int i = 0; i < 64; ++i) sums[i / 4] += w[i] * x[i % 4];
#endif
}

template <int step>
struct DecodedCodes {
  static constexpr int kUnitK = 16, kUnitBytes = 4 * kQuadBytes, kStep = step;
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    EFFINFER_UNROLL
    for (int q = 0; q < 4; ++q) use(q, load_quad(w + q * kQuadBytes));
  }
};

// What formats that decode in registers share.
template <class F, LowbitFormat kFormat>
struct DirectCodes {
  static constexpr lowbit::Layout kLayout = lowbit::layout(kFormat);
  static constexpr int kUnitK = kLayout.unit_k, kUnitBytes = kLayout.unit_bytes;
  static constexpr int kStep = kLayout.step, kCentre = kLayout.centre;
  static constexpr int kDirectRows = effinfer::kDirectRows;
  static constexpr bool kDecodes = true;
  using Decoded = DecodedCodes<kStep>;

  static void decode(const uint8_t* w, int64_t units, uint8_t* out) {
    for (; units > 0; --units, w += kUnitBytes, out += kUnitK / 4 * kQuadBytes)
      F::quads(w, [&](int q, Quad codes) __attribute__((always_inline)) {
        *reinterpret_cast<QuadAny*>(out + q * kQuadBytes) = codes;
      });
  }
};

struct Int8 : DirectCodes<Int8, LowbitFormat::int8> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    use(0, load_quad(w) ^ bytes(0x80));  // codes again, from values
  }
};

struct Int4 : DirectCodes<Int4, LowbitFormat::int4> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    const Quad both = load_quad(w), low = bytes(15);
    use(0, both & low);
    use(1, shift_right<4>(both) & low);
  }
};

template <LowbitFormat kFormat>
struct TwoBits : DirectCodes<TwoBits<kFormat>, kFormat> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    const Quad all = load_quad(w), low = bytes(3);
    use(0, all & low);
    use(1, shift_right<2>(all) & low);
    use(2, shift_right<4>(all) & low);
    use(3, shift_right<6>(all) & low);
  }
};
using Int2 = TwoBits<LowbitFormat::int2>;
using Ternary = TwoBits<LowbitFormat::ternary>;

struct Int3 : DirectCodes<Int3, LowbitFormat::int3> {
  // Bit p of each byte as its bit 2.
  template <int p>
  static EFFINFER_INLINE Quad high_bit(Quad x) {
    if constexpr (p < 2)
      return shift_left<2 - p>(x) & bytes(4);
    else
      return shift_right<p - 2>(x) & bytes(4);
  }
  template <int p, class Use>
  static EFFINFER_INLINE void half(Quad low, Quad high, const Use& use) {
    use(p, (low & bytes(3)) | high_bit<p>(high));
    use(p + 1, (shift_right<2>(low) & bytes(3)) | high_bit<p + 1>(high));
    use(p + 2, (shift_right<4>(low) & bytes(3)) | high_bit<p + 2>(high));
    use(p + 3, (shift_right<6>(low) & bytes(3)) | high_bit<p + 3>(high));
  }
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    const Quad high = load_quad(w + 128);
    half<0>(load_quad(w), high, use);
    half<4>(load_quad(w + 64), high, use);
  }
};

struct Binary : DirectCodes<Binary, LowbitFormat::binary> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, const Use& use) {
    EFFINFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      use(2 * j, spread_bits<0>(w + 16 * j));
      use(2 * j + 1, spread_bits<4>(w + 16 * j));
    }
  }
};

struct TernaryDense {
  static constexpr int kUnitK = 48, kUnitBytes = 160, kStep = 1, kCentre = 1, kDirectRows = 0;
  static constexpr bool kDecodes = true;
  using Decoded = DecodedCodes<1>;
  static void decode(const uint8_t* w, int64_t units, uint8_t* out) { decode_dense(w, units, out); }
};

// Two chains a row: vpdpbusd takes five cycles.
template <class F, int R>
__attribute__((noinline)) void dot(const uint8_t* w, const int8_t* x, int64_t x_stride,
                                   int64_t units, const Sink& sink) {
  Sums sum[R][2] = {};
  const auto unit = [&](int odd) __attribute__((always_inline)) {
    F::quads(w, [&](int q, Quad codes) __attribute__((always_inline)) {
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r)
        add_products(sum[r][(q + odd) % 2], codes, x + r * x_stride + 4 * q);
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
  IVec sums[R][kVecs];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    const Sums both = sum[r][0] + sum[r][1];
    memcpy(sums[r], &both, sizeof(both));
  }
  sink.take<R, F::kStep>(sums);
}

}  // namespace
}  // namespace effinfer
