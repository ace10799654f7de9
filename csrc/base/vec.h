// Float vectors at the native width of the file's compile flags, on GCC/Clang vector extensions.
// Included only by ISA files (avx2.cpp, avx512.cpp, neon.cpp) and generic.h; everything is in an
// unnamed namespace, so no inline function compiled with -mavx2 can be the copy the linker keeps.
// gcc 12 traps: fully unroll loops that index arrays of vectors (EFFINFER_UNROLL), and copy sizes
// and pointers to locals (stores through may_alias types make the compiler reload struct fields).
#pragma once
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EFFINFER_UNROLL _Pragma("GCC unroll 64")
#define EFFINFER_INLINE inline __attribute__((always_inline))

namespace effinfer {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// clang-format off
typedef float    Vec  __attribute__((vector_size(kLanes * 4)));
typedef int32_t  IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef float    VecAny  __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalfAny __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef uint8_t  ByteVec __attribute__((vector_size(kLanes * 4)));
typedef uint8_t  Quarter __attribute__((vector_size(kLanes)));
// clang-format on

EFFINFER_INLINE Vec splat(float x) { return x - Vec{}; }
EFFINFER_INLINE IVec splat_i(int32_t x) { return x - IVec{}; }
EFFINFER_INLINE IVec bits_of(Vec x) { return (IVec)x; }
EFFINFER_INLINE Vec from_bits(IVec x) { return (Vec)x; }

// mask lanes are all ones or all zeros, as comparisons give them.
EFFINFER_INLINE Vec select(IVec mask, Vec yes, Vec no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_blendv_ps(no, yes, (Vec)mask);
#else
  return (Vec)((mask & (IVec)yes) | (~mask & (IVec)no));
#endif
}

// Yes where `sign` is negative or -0.
EFFINFER_INLINE Vec select_negative(Vec sign, Vec yes, Vec no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_blendv_ps(no, yes, sign);
#else
  return select(bits_of(sign) >> 31, yes, no);
#endif
}

// Whether every lane of a comparison holds.
EFFINFER_INLINE bool all(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) == 0xff;
#elif defined(__aarch64__)
  return vminvq_u32((uint32x4_t)mask) != 0;
#else
  return (mask[0] & mask[1] & mask[2] & mask[3]) != 0;
#endif
}

EFFINFER_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// c - a b, rounded once.
EFFINFER_INLINE Vec fnma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmsq_f32(c, a, b);
#else
  return c - a * b;
#endif
}

// Like the CPU's min/max: the second operand when either is NaN (AVX), NaN on NEON.
EFFINFER_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__aarch64__)
  return vminq_f32(a, b);
#else
  return select(a < b, a, b);
#endif
}

EFFINFER_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return select(a > b, a, b);
#endif
}

EFFINFER_INLINE Vec abs(Vec x) { return (Vec)((IVec)x & splat_i(0x7fffffff)); }

EFFINFER_INLINE Vec round(Vec x) {  // to nearest, ties to even
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return vrndnq_f32(x);
#else
  const Vec magic = splat(12582912.f);
  return (x + magic) - magic;
#endif
}

EFFINFER_INLINE IVec to_int(Vec x) {  // of an already rounded value
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtps_epi32(x);
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtps_epi32(x);
#elif defined(__aarch64__)
  return (IVec)vcvtnq_s32_f32(x);
#else
  return __builtin_convertvector(x, IVec);
#endif
}

// Byte i of each lane as its highest byte, zeros below.
template <int i>
EFFINFER_INLINE IVec top_byte(IVec x) {
  if constexpr (i == 3) return x & splat_i(static_cast<int32_t>(0xff000000u));
  if constexpr (i == 0) return x << 24;
#if defined(__AVX512BW__)
  return (IVec)_mm512_maskz_shuffle_epi8(
      0x8888888888888888u, (__m512i)x,
      _mm512_set4_epi32((12 + i) << 24, (8 + i) << 24, (4 + i) << 24, i << 24));
#elif defined(__AVX2__)
  constexpr int32_t kRest = 0x00808080;
  constexpr int32_t k0 = i << 24 | kRest, k1 = k0 + (4 << 24), k2 = k0 + (8 << 24);
  constexpr int32_t k3 = k0 + (12 << 24);
  return (IVec)_mm256_shuffle_epi8((__m256i)x, _mm256_setr_epi32(k0, k1, k2, k3, k0, k1, k2, k3));
#else
  return x << (24 - 8 * i) & splat_i(static_cast<int32_t>(0xff000000u));
#endif
}

// x, rounded here: compilers contract x * y + z across statements, but not across this.
EFFINFER_INLINE Vec rounded(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

EFFINFER_INLINE IVec subtract_bytes(IVec a, IVec b) { return (IVec)((ByteVec)a - (ByteVec)b); }

EFFINFER_INLINE Vec to_float(IVec x) { return __builtin_convertvector(x, Vec); }

// ---- memory -------------------------------------------------------------------------------------

EFFINFER_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }

EFFINFER_INLINE Vec load(const bf16* p) {
  const Half h = *reinterpret_cast<const HalfAny*>(p);
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
#endif
}

EFFINFER_INLINE Vec load(const f16* p) {
  const Half h = *reinterpret_cast<const HalfAny*>(p);
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h));
#endif
}

// kLanes bytes, each the number in its lane.
EFFINFER_INLINE IVec load_u8(const uint8_t* p) {
  Quarter bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc 12 converts by halves
  return (IVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(bytes, IVec);
#endif
}

// kLanes little-endian 16-bit words, each the number in its lane.
EFFINFER_INLINE IVec load_u16(const uint8_t* p) {
  const Half h = *reinterpret_cast<const HalfAny*>(p);
  return __builtin_convertvector(h, IVec);
}

EFFINFER_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAny*>(p) = x; }

EFFINFER_INLINE void store(bf16* p, Vec x) {  // round to nearest even; NaN becomes all ones
  const UVec u = (UVec)x;
  const UVec r = ((u + 0x7fff + ((u >> 16) & 1)) | (UVec)(x != x)) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)  // convertvector takes gcc 12 twice as long
  const __m256i wide = (__m256i)r;
  *reinterpret_cast<HalfAny*>(p) =
      (HalfAny)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  *reinterpret_cast<HalfAny*>(p) = (HalfAny) __builtin_convertvector(r, Half);
#endif
}

EFFINFER_INLINE void store(f16* p, Vec x) {
#if defined(__AVX512F__)
  *reinterpret_cast<HalfAny*>(p) = (HalfAny)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  *reinterpret_cast<HalfAny*>(p) = (HalfAny)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  *reinterpret_cast<HalfAny*>(p) = (HalfAny)vreinterpret_u16_f16(vcvt_f16_f32(x));
#endif
}

// First n (0 <= n < kLanes) elements; the other lanes are zero. Touches nothing beyond.
template <class T>
EFFINFER_INLINE Vec load_n(const T* p, int64_t n) {
  T part[kLanes];
  std::memset(part, 0, sizeof(part));
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

template <class T>
EFFINFER_INLINE void store_n(T* p, Vec x, int64_t n) {
  T part[kLanes];
  store(part, x);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// The lanes' numbers, for what needs them as constants.
template <int... j>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// kLanes elements `stride` apart, as one expression per lane: a loop over an array of 16-bit
// elements would load the vector before its parts have left the store queue.
template <int... j>
EFFINFER_INLINE Vec load_apart(const float* p, int64_t stride, Lanes<j...>) {
  return Vec{p[j * stride]...};
}
template <class T, int... j>
EFFINFER_INLINE Vec load_apart(const T* p, int64_t stride, Lanes<j...>) {
  const Half bits = {p[j * stride].bits...};
  T part[kLanes];
  std::memcpy(part, &bits, sizeof(part));
  return load(part);
}

// n elements `stride` apart; the other lanes are zero.
template <class T>
EFFINFER_INLINE Vec load_strided(const T* p, int64_t stride, int64_t n = kLanes) {
  if (n == kLanes) return load_apart(p, stride, AllLanes{});
  T part[kLanes];
  std::memset(part, 0, sizeof(part));
  for (int64_t i = 0; i < n; ++i) part[i] = p[i * stride];
  return load(part);
}

template <class T>
EFFINFER_INLINE void store_strided(T* p, int64_t stride, Vec x, int64_t n = kLanes) {
  T part[kLanes];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = part[i];
}

// One element, for loop tails and scalars.
EFFINFER_INLINE float load1(const float* p) { return *p; }
template <class T>
EFFINFER_INLINE float load1(const T* p) {
  return load_n(p, 1)[0];
}
EFFINFER_INLINE void store1(float* p, float x) { *p = x; }
template <class T>
EFFINFER_INLINE void store1(T* p, float x) {
  store_n(p, splat(x), 1);
}

// Rows become columns, by exchanging blocks of 1, 2, 4.. lanes between rows that far apart.
template <int kApart, int... j>
EFFINFER_INLINE void exchange(Vec& a, Vec& b, Lanes<j...>) {
  const Vec low = __builtin_shufflevector(a, b, ((j & kApart) ? kLanes + j - kApart : j)...);
  b = __builtin_shufflevector(a, b, ((j & kApart) ? kLanes + j : j + kApart)...);
  a = low;
}

template <int kApart = 1>
EFFINFER_INLINE void transpose(Vec (&rows)[kLanes]) {
  EFFINFER_UNROLL
  for (int i = 0; i < kLanes; ++i)
    if ((i & kApart) == 0) exchange<kApart>(rows[i], rows[i + kApart], AllLanes{});
  if constexpr (kApart * 2 < kLanes) transpose<kApart * 2>(rows);
}

// Sum of all lanes, halves first: a fixed order, part of every op's contract.
EFFINFER_INLINE float sum(Vec x) {
  float part[kLanes];
  std::memcpy(part, &x, sizeof(part));
  EFFINFER_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    EFFINFER_UNROLL
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// ---- functions (largest error in ulp found over all floats in the stated range) -----------------

// p * 2^n for 1/2 <= p < 2 and an already rounded n, where the result is not denormal.
EFFINFER_INLINE Vec scale_exponent(Vec p, Vec n) {
  return (Vec)((UVec)p + ((UVec)to_int(n) << 23));
}

// 2^x, <= 2 ulp, for |x| <= kExp2Bound; NaN for NaN.
constexpr float kExp2Bound = 126.f;
EFFINFER_INLINE Vec exp2_bounded(Vec x) {
  const Vec n = round(x), r = x - n;
  Vec q = splat(0.0013225285802036524f);
  q = fma(q, r, splat(0.0096717718988657f));
  q = fma(q, r, splat(0.05550890043377876f));
  q = fma(q, r, splat(0.24022234976291656f));
  q = fma(q, r, splat(0.693146824836731f));
  return scale_exponent(fma(q, r, splat(1.f)), n);
}

// 2^x, <= 2 ulp; inf from 128, NaN for NaN, 0 from -127 down, something below 2^-126 between -127
// and -126. The clamped ends come out of the exponent arithmetic exactly, and max and min keep
// their second operand when it is NaN: no select is needed.
EFFINFER_INLINE Vec exp2(Vec x) { return exp2_bounded(max(splat(-127.f), min(splat(128.f), x))); }

// e^x, <= 2 ulp, for |x| <= kExpBound; NaN for NaN.
constexpr float kExpBound = 87.33654f;
EFFINFER_INLINE Vec exp_bounded(Vec x) {
  const Vec n = round(x * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec q = splat(0.0013901282800361514f);
  q = fma(q, r, splat(0.008363145403563976f));
  q = fma(q, r, splat(0.04166685417294502f));
  q = fma(q, r, splat(0.16666577756404877f));
  q = fma(q, r, splat(0.5f));
  return scale_exponent(fma(q, r * r, r) + splat(1.f), n);
}

// e^x, <= 2 ulp; 0 below -87.33, inf above 88.72, NaN for NaN.
EFFINFER_INLINE Vec exp(Vec x) {
  const Vec lo = splat(-kExpBound), hi = splat(88.72283f);
  Vec y = exp_bounded(max(lo, min(hi, x)));
  y = select(x > hi, splat(__builtin_inff()), y);
  return select(x < lo, Vec{}, y);
}

// log(1 + y) for 0 <= y <= 1, <= 2 ulp: 2 atanh(y / (2 + y)).
EFFINFER_INLINE Vec log1p_unit(Vec y) {
  const Vec s = y / (y + splat(2.f));
  const Vec t = s * s;
  Vec q = splat(0.14089162647724152f);
  q = fma(q, t, splat(0.13980302214622498f));
  q = fma(q, t, splat(0.20012454688549042f));
  q = fma(q, t, splat(0.3333315849304199f));
  const Vec s2 = s + s;
  return fma(q * t, s2, s2);
}

// log(1 + e^x), as torch's softplus; below -kExpBound about 2^-126 instead of less.
EFFINFER_INLINE Vec softplus(Vec x) {
  return max(Vec{}, x) + log1p_unit(exp_bounded(max(splat(-kExpBound), -abs(x))));
}

// x[i] = 1 + e^-x[i], cheaper than exp: its relative error grows as 6e-8 |x| below 0, and it is inf
// where e^-x reaches 2^128. Step by step for all N, because gcc keeps the source's order and one
// chain alone waits for its latencies.
template <int N>
EFFINFER_INLINE void one_plus_exp_minus(Vec (&x)[N]) {
  constexpr float kCoefficients[] = {0.009671513f, 0.055507336f, 0.24022242f, 0.693147f, 1.f};
  IVec exponent[N];
  Vec q[N];
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i)
    x[i] = min(splat(128.f), max(splat(-126.f), x[i] * splat(-1.44269504f)));  // keeps a NaN
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) {
    const Vec n = round(x[i]);
    x[i] -= n;
    exponent[i] = to_int(n) << 23;
  }
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) q[i] = fma(splat(0.0013264727f), x[i], splat(kCoefficients[0]));
  EFFINFER_UNROLL
  for (int k = 1; k < 5; ++k) {
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) q[i] = fma(q[i], x[i], splat(kCoefficients[k]));
  }
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) x[i] = splat(1.f) + from_bits(bits_of(q[i]) + exponent[i]);
}

EFFINFER_INLINE Vec sigmoid(Vec x) {
  Vec d[1] = {x};
  one_plus_exp_minus(d);
  return splat(1.f) / d[0];
}

template <int N>
EFFINFER_INLINE void silu_each(Vec (&x)[N]) {
  Vec d[N];
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) d[i] = x[i];
  one_plus_exp_minus(d);
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) x[i] = x[i] / d[i];
}

EFFINFER_INLINE Vec silu(Vec x) {
  Vec y[1] = {x};
  silu_each(y);
  return y[0];
}

}  // namespace
}  // namespace effinfer
