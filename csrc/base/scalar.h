// One-element arithmetic for the scalar kernels: the definitions the vector files are held to.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/dtype.h"

namespace effinfer::scalar {

inline float bits_to_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float get(const float* p) { return *p; }
inline float get(const bf16* p) { return bits_to_float(uint32_t{p->bits} << 16); }
inline float get(const f16* p) {
  const uint32_t sign = uint32_t{p->bits & 0x8000u} << 16;
  const uint32_t exponent = (p->bits >> 10) & 31, mantissa = p->bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(x);
  p->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void put(f16* p, float x) {  // round to nearest even, overflow to inf, subnormals kept
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by the FPU
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | h);
}

// Element `at` of an array whose type is known at run time.
inline float get(const void* data, DType type, int64_t at) {
  float x = 0;
  with_type(type, [&](auto t) { x = get(static_cast<const decltype(t)*>(data) + at); });
  return x;
}
inline void put(void* data, DType type, int64_t at, float x) {
  with_type(type, [&](auto t) { put(static_cast<decltype(t)*>(data) + at, x); });
}

inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }
inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }
inline float silu(float x) { return x / (1.f + std::exp(-x)); }

}  // namespace effinfer::scalar
