// AVX2: codes of each packed format in registers, and their exact products with int8. 32 bytes hold
// 8 outputs, four consecutive k each ("a quad"), two such vectors the 16 of a panel.
#pragma once
#include "base/vec.h"
#include "ops/lowbit_linear/dense_sse.h"
#include "ops/lowbit_linear/group.h"

namespace effinfer {
namespace {

using Int = __m256i;

constexpr int kDirectRows = 4;
constexpr int kTileRows = 6;
constexpr int kLargestX = 127;
constexpr int64_t kQuadBytes = 64;
constexpr int64_t kAhead = 1024;  // bytes of a panel: about where its next turn begins

// vpmaddubsw adds two products, and i16 sums hold so many of its results.
constexpr int flush_bound(int max_code) { return 32767 / (2 * max_code * kLargestX); }
static_assert(flush_bound(15) == 8 && flush_bound(7) == 18 && flush_bound(3) == 43);
static_assert(flush_bound(2) == 64 && flush_bound(1) == 129 && 2 * 128 * kLargestX <= 32767);

EFFINFER_INLINE Int load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const Int*>(p));
}
EFFINFER_INLINE Int bytes(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
template <int n>
EFFINFER_INLINE Int shift_right(Int x) {  // of bytes: what comes in from the left is to be masked
  return n == 0 ? x : _mm256_srli_epi16(x, n);
}

// Units of decoded codes: four quads.
template <int max_code, int step>
struct DecodedCodes {
  static constexpr int kUnitK = 16, kUnitBytes = 4 * kQuadBytes, kMaxCode = max_code, kStep = step;
  static constexpr bool kSigned = false, kFromMemory = false;
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, Use&& use) {
    EFFINFER_UNROLL
    for (int q = 0; q < 4; ++q) use(q, load_bytes(w + q * 64), load_bytes(w + q * 64 + 32));
  }
};

// What formats that decode in registers share.
template <class F, int unit_k, int unit_bytes, int max_code, int step, int centre>
struct DirectCodes {
  static constexpr int kUnitK = unit_k, kUnitBytes = unit_bytes, kMaxCode = max_code;
  static constexpr int kStep = step, kCentre = centre, kDirectRows = effinfer::kDirectRows;
  static constexpr bool kSigned = false, kDecodes = true, kFromMemory = true;
  using Decoded = DecodedCodes<(max_code > 3 ? max_code : 3), step>;

  static void decode(const uint8_t* w, int64_t units, uint8_t* out) {
    for (int64_t u = 0; u < units; ++u, w += unit_bytes, out += unit_k / 4 * kQuadBytes) {
      F::quads(w, [&](int q, Int a, Int b) __attribute__((always_inline)) {
        _mm256_store_si256(reinterpret_cast<Int*>(out + q * kQuadBytes), a);
        _mm256_store_si256(reinterpret_cast<Int*>(out + q * kQuadBytes + 32), b);
      });
    }
  }
};

struct Int4 : DirectCodes<Int4, 8, 64, 15, 1, 8> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, Use&& use) {
    const Int a = load_bytes(w), b = load_bytes(w + 32), low = bytes(15);
    use(0, a & low, b & low);
    use(1, shift_right<4>(a) & low, shift_right<4>(b) & low);
  }
};

template <int max_code, int centre>
struct TwoBits : DirectCodes<TwoBits<max_code, centre>, 16, 64, max_code, 1, centre> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, Use&& use) {
    const Int a = load_bytes(w), b = load_bytes(w + 32), low = bytes(3);
    use(0, a & low, b & low);
    use(1, shift_right<2>(a) & low, shift_right<2>(b) & low);
    use(2, shift_right<4>(a) & low, shift_right<4>(b) & low);
    use(3, shift_right<6>(a) & low, shift_right<6>(b) & low);
  }
};
using Int2 = TwoBits<3, 2>;
using Ternary = TwoBits<2, 1>;

struct Int3 : DirectCodes<Int3, 32, 192, 7, 1, 4> {
  // Bit p of each byte as its bit 2.
  template <int p>
  static EFFINFER_INLINE Int high_bit(Int x) {
    if constexpr (p < 2)
      x = _mm256_slli_epi16(x, 2 - p);
    else
      x = shift_right<p - 2>(x);
    return x & bytes(4);
  }
  template <int p>
  static EFFINFER_INLINE Int code(Int low, Int high) {
    return (shift_right<p % 4 * 2>(low) & bytes(3)) | high_bit<p>(high);
  }
  template <int p, class Use>
  static EFFINFER_INLINE void quad(const uint8_t* w, Use&& use) {
    const uint8_t* const low = w + p / 4 * 64;
    use(p, code<p>(load_bytes(low), load_bytes(w + 128)),
        code<p>(load_bytes(low + 32), load_bytes(w + 160)));
  }
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, Use&& use) {
    quad<0>(w, use), quad<1>(w, use), quad<2>(w, use), quad<3>(w, use);
    quad<4>(w, use), quad<5>(w, use), quad<6>(w, use), quad<7>(w, use);
  }
};

struct Binary : DirectCodes<Binary, 32, 64, 1, 2, 1> {
  template <class Use>
  static EFFINFER_INLINE void quads(const uint8_t* w, Use&& use) {
    // Each output's byte four times, outputs 0 to 7 and 8 to 15; then a bit of it in each.
    const Int first = _mm256_setr_epi64x(0x0101010100000000, 0x0303030302020202, 0x0505050504040404,
                                         0x0707070706060606);
    const Int second = first + bytes(8), one = bytes(1);
    const Int low = _mm256_set1_epi32(0x08040201), high = _mm256_set1_epi32(0x80402010);
    EFFINFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Int octets = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * j)));
      const Int a = _mm256_shuffle_epi8(octets, first), b = _mm256_shuffle_epi8(octets, second);
      use(2 * j, _mm256_min_epu8(a & low, one), _mm256_min_epu8(b & low, one));
      use(2 * j + 1, _mm256_min_epu8(a & high, one), _mm256_min_epu8(b & high, one));
    }
  }
};

// Values as they are: nothing to decode, and i16 sums hold one product pair only.
struct Int8 {
  static constexpr int kUnitK = 4, kUnitBytes = 64, kStep = 1, kCentre = 0, kDirectRows = 0;
  static constexpr bool kSigned = true, kDecodes = false;
  using Decoded = Int8;
};

struct TernaryDense {
  static constexpr int kUnitK = 48, kUnitBytes = 160, kStep = 1, kCentre = 1, kDirectRows = 0;
  static constexpr bool kDecodes = true;
  using Decoded = DecodedCodes<3, 1>;

  static void decode(const uint8_t* w, int64_t units, uint8_t* out) { decode_dense(w, units, out); }
};

EFFINFER_INLINE Int four_of(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof(word));
  return _mm256_set1_epi32(word);
}

// sum += codes * x, two products to an i16. In place, one product after the other: left to itself
// gcc 12 multiplies first, adds in a tree and spills half of the sums, at half the speed.
EFFINFER_INLINE void accumulate(Int& sum, Int codes, Int x) {
  Int product;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "x"(codes), "x"(x));
}

// sum += w * x, four products to an i32, with magnitude = |w|.
EFFINFER_INLINE void accumulate(Int& sum, Int magnitude, Int w, Int x, Int ones) {
  Int product;
  asm("vpsignb %3, %4, %1\n\tvpmaddubsw %1, %2, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "x"(magnitude), "x"(w), "x"(x), "x"(ones));
}

// Panels that take turns are streams that pause, which hardware prefetchers lose: one row on 4 bits
// takes a fifth less with this.
template <int64_t size>
EFFINFER_INLINE void prefetch_ahead(const uint8_t* w) {
  EFFINFER_UNROLL
  for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(w + kAhead + line);
}

// A run of unsigned codes: so few that their products fit 16 bits.
template <class F, int R>
__attribute__((noinline)) void dot_run(const uint8_t* w, const int8_t* x, int64_t x_stride,
                                       int64_t units, const Sink& sink) {
  Int part[R][2];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
  for (; units > 0; --units, w += F::kUnitBytes, x += F::kUnitK) {
    if constexpr (F::kFromMemory) prefetch_ahead<F::kUnitBytes>(w);
    F::quads(w, [&](int q, Int a, Int b) __attribute__((always_inline)) {
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const Int four = four_of(x + r * x_stride + 4 * q);
        accumulate(part[r][0], a, four);
        accumulate(part[r][1], b, four);
      }
    });
  }
  IVec sums[R][2];
  EFFINFER_UNROLL
  for (int i = 0; i < 2 * R; ++i)
    sums[i / 2][i % 2] = (IVec)_mm256_madd_epi16(part[i / 2][i % 2], _mm256_set1_epi16(1));
  sink.take<R, F::kStep>(sums);
}

template <class F, int R>
EFFINFER_INLINE void dot_unsigned(const uint8_t* w, const int8_t* x, int64_t x_stride,
                                  int64_t units, const Sink& sink) {
  constexpr int64_t kRun = flush_bound(F::kMaxCode) / (F::kUnitK / 4);  // units, whatever x is
  static_assert(kRun >= 1);
  const int64_t known = sink.run_k / F::kUnitK, run = known > kRun ? known : kRun;
  if (units <= run) return dot_run<F, R>(w, x, x_stride, units, sink);
  Sink waiting = {sink.sums, sink.first, nullptr, 0};
  for (; units > run; units -= run, w += run * F::kUnitBytes, x += run * F::kUnitK) {
    dot_run<F, R>(w, x, x_stride, run, waiting);
    waiting.first = false;
  }
  waiting.end = sink.end;
  dot_run<F, R>(w, x, x_stride, units, waiting);
}

// Signed bytes: |w| times x with w's sign, exact in i16 for one quad since |w| <= 128.
template <int R>
__attribute__((noinline)) void dot_signed(const uint8_t* w, const int8_t* x, int64_t x_stride,
                                          int64_t units, const Sink& sink) {
  const Int ones = _mm256_set1_epi16(1);
  Int sum[R][2];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  for (; units > 0; --units, w += 64, x += 4) {
    if constexpr (R <= kDirectRows) prefetch_ahead<64>(w);
    const Int a = load_bytes(w), b = load_bytes(w + 32);
    const Int abs_a = _mm256_abs_epi8(a), abs_b = _mm256_abs_epi8(b);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      const Int four = four_of(x + r * x_stride);
      accumulate(sum[r][0], abs_a, a, four, ones);
      accumulate(sum[r][1], abs_b, b, four, ones);
    }
  }
  IVec sums[R][2];
  EFFINFER_UNROLL
  for (int i = 0; i < 2 * R; ++i) sums[i / 2][i % 2] = (IVec)sum[i / 2][i % 2];
  sink.take<R, 1>(sums);
}

template <class F, int R>
EFFINFER_INLINE void dot(const uint8_t* w, const int8_t* x, int64_t x_stride, int64_t units,
                         const Sink& sink) {
  if constexpr (F::kSigned)
    dot_signed<R>(w, x, x_stride, units, sink);
  else
    dot_unsigned<F, R>(w, x, x_stride, units, sink);
}

}  // namespace
}  // namespace effinfer
