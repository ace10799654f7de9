// Signs to bits and popcounts to y, on vec.h; counting is the ISA files' own (tile.h).
#pragma once
#include "base/vec.h"
#include "ops/binary_linear/bits.h"
#include "ops/linear/epilogue.h"

namespace effinfer {
namespace {

using namespace binary_layout;

constexpr int kStep = 16;  // elements whose signs are taken together
constexpr int kStepVecs = kStep / kLanes;

// One bit per lane of a comparison's result.
EFFINFER_INLINE uint32_t lanes_set(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__aarch64__)
  return vaddvq_u32((uint32x4_t)(mask & IVec{1, 2, 4, 8}));
#endif
}

// Up to kLanes elements, zeros past `left`.
template <class T>
EFFINFER_INLINE Vec values_at(const T* p, int64_t left) {
  return load_up_to(p, left);
}
EFFINFER_INLINE IVec values_at(const int32_t* p, int64_t left) {
  return bits_of(load_up_to(reinterpret_cast<const float*>(p), left));
}

// X is what x holds, V the vector its comparisons take, T what the thresholds are.
template <class X, class V, class T>
void signs_of(const SignRows& a) {
  const auto* const threshold = static_cast<const T*>(a.threshold);
  const int64_t k = a.k;
  for (int64_t r = 0; r < a.rows; ++r) {
    const X* const x = static_cast<const X*>(a.x) + r * a.x_stride;
    uint8_t* const bits = a.bits + r * a.bits_stride;
    V sums[kStepVecs] = {};
    for (int64_t i = 0; i < k; i += kStep) {
      uint32_t set = 0;
      EFFINFER_UNROLL
      for (int v = 0; v < kStepVecs; ++v) {
        const int64_t at = i + v * kLanes, left = k - at;
        const V value = values_at(x + at, left);
        const V least = threshold != nullptr ? values_at(threshold + at, left) : V{};
        set |= lanes_set(value < least) << (v * kLanes);
        if constexpr (sizeof(T) == sizeof(float) && __is_same(V, Vec)) sums[v] += abs(value);
      }
      const auto two = static_cast<uint16_t>(set);
      std::memcpy(bits + i / 8, &two, k - i > 8 ? 2 : 1);
    }
    if constexpr (__is_same(V, Vec)) {
      if (a.mean == nullptr) continue;
      float part[kStep];
      EFFINFER_UNROLL
      for (int v = 0; v < kStepVecs; ++v) store(part + v * kLanes, sums[v]);
      EFFINFER_UNROLL
      for (int half = kStep / 2; half > 0; half /= 2) {
        EFFINFER_UNROLL
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
      }
      a.mean[r] = part[0] / static_cast<float>(k);
    }
  }
}

EFFINFER_INLINE void signs(const SignRows& a) {
  if (a.integers) return signs_of<int32_t, IVec, int32_t>(a);
  with_type(a.type, [&](auto x) { signs_of<decltype(x), Vec, float>(a); });
}

// One part of a group: counts in, xs ws (terms - 2 count) + bias out, as float32 in their place.
void scale_counts(const FinishTask& t, int64_t part, int64_t valid) {
  float* const sums = reinterpret_cast<float*>(t.counts) + part * t.rows * kPart;
  for (int64_t v = 0; v < valid; v += kLanes) {
    const int64_t n = part * kPart + v, left = valid - v;
    const Vec scale = t.weight_scale != nullptr ? load_up_to(t.weight_scale + n, left) : splat(1.f);
    const Vec bias = t.bias != nullptr ? load_up_to(t.bias + n, left) : Vec{};
    for (int64_t r = 0; r < t.rows; ++r) {
      float* const at = sums + r * kPart + v;
      const IVec dot = splat_i(t.terms[r * t.terms_stride]) - 2 * bits_of(load(at));
      const Vec exact = __builtin_convertvector(dot, Vec);
      store(at, t.x_scale != nullptr ? fma(exact * scale, splat(t.x_scale[r]), bias)
                                     : fma(exact, scale, bias));
    }
  }
}

template <class T>
void finish_group(const FinishTask& t) {
  for (int64_t part = 0; part * kPart < t.outputs; ++part) {
    const int64_t n = part * kPart, left = t.outputs - n;
    Finish<T> o = {};
    o.valid = left < kPart ? left : kPart;
    scale_counts(t, part, o.valid);
    o.sums = reinterpret_cast<const float*>(t.counts) + part * t.rows * kPart;
    if (t.residual != nullptr) o.residual = static_cast<const T*>(t.residual) + n;
    o.y = static_cast<T*>(t.y) + n;
    o.rows = t.rows;
    o.residual_stride = t.residual_stride;
    o.y_stride = t.y_stride;
    finish_panel(t.epilogue, o);
  }
}

EFFINFER_INLINE void finish_counts(const FinishTask& t) {
  with_type(t.type, [&](auto y) { finish_group<decltype(y)>(t); });
}

}  // namespace
}  // namespace effinfer
