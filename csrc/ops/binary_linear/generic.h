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

// The bits of up to kStep elements (`left` of them); adds their magnitudes to the sums.
template <bool kWhole, class X, class V, class T>
EFFINFER_INLINE uint32_t step_signs(const X* x, const T* threshold, int64_t left,
                                    V (&sums)[kStepVecs]) {
  uint32_t set = 0;
  EFFINFER_UNROLL
  for (int v = 0; v < kStepVecs; ++v) {
    const int64_t at = v * kLanes, here = kWhole ? kLanes : left - at;
    const V value = values_at(x + at, here);
    const V least = threshold != nullptr ? values_at(threshold + at, here) : V{};
    set |= lanes_set(value < least) << at;
    if constexpr (__is_same(V, Vec)) sums[v] += abs(value);
  }
  return set;
}

// X is what x holds, V the vector its comparisons take, T what the thresholds are.
template <class X, class V, class T>
void signs_of(const SignRows& a) {
  const auto* const threshold = static_cast<const T*>(a.threshold);
  const int64_t k = a.k;
  const auto threshold_at = [&](int64_t i) __attribute__((always_inline)) {
    return threshold != nullptr ? threshold + i : nullptr;
  };
  for (int64_t r = 0; r < a.rows; ++r) {
    const X* const x = static_cast<const X*>(a.x) + r * a.x_stride;
    uint8_t* const bits = a.bits + r * a.bits_stride;
    V sums[kStepVecs] = {};
    int64_t i = 0;
    for (; k - i >= kStep; i += kStep) {
      const auto two = static_cast<uint16_t>(step_signs<true>(x + i, threshold_at(i), kStep, sums));
      std::memcpy(bits + i / 8, &two, 2);
    }
    if (i < k) {
      const auto two =
          static_cast<uint16_t>(step_signs<false>(x + i, threshold_at(i), k - i, sums));
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
        for (int j = 0; j < half; ++j) part[j] += part[j + half];
      }
      a.mean[r] = part[0] / static_cast<float>(k);
    }
  }
}

EFFINFER_INLINE void signs(const SignRows& a) {
  if (a.integers) return signs_of<int32_t, IVec, int32_t>(a);
  with_type(a.type, [&](auto x) { signs_of<decltype(x), Vec, float>(a); });
}

// One part of a group: counts in, xs ws (terms - 2 count) + bias out, to y where that is all there
// is to do, else as float32 in the counts' place.
template <class T>
void scale_part(const FinishTask& t, int64_t part, int64_t valid, T* y) {
  constexpr int kVecs = kPart / kLanes;
  const int64_t rows = t.rows, n = part * kPart, terms_stride = t.terms_stride;
  const int64_t y_stride = y != nullptr ? t.y_stride : 0;
  const int32_t* const terms = t.terms;
  const float* const x_scale = t.x_scale;
  float* at = reinterpret_cast<float*>(t.counts) + part * rows * kPart;
  Vec scale[kVecs], bias[kVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    const int64_t first = v * kLanes, left = valid - first;
    scale[v] =
        t.weight_scale != nullptr ? load_up_to(t.weight_scale + n + first, left) : splat(1.f);
    bias[v] = t.bias != nullptr ? load_up_to(t.bias + n + first, left) : Vec{};
  }
  for (int64_t r = 0; r < rows; ++r, at += kPart, y += y_stride) {
    const IVec most = splat_i(terms[r * terms_stride]);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const int64_t first = v * kLanes, left = valid - first;
      const Vec dot = __builtin_convertvector(most - 2 * bits_of(load(at + first)), Vec);
      const Vec out = x_scale != nullptr ? fma(dot * scale[v], splat(x_scale[r]), bias[v])
                                         : fma(dot, scale[v], bias[v]);
      if (y == nullptr)
        store(at + first, out);
      else if (left >= kLanes)
        store(y + first, out);
      else if (left > 0)
        store_n(y + first, out, left);
    }
  }
}

template <class T>
void finish_group(const FinishTask& t) {
  const bool plain = t.epilogue == Epilogue::none && t.residual == nullptr;
  for (int64_t part = 0; part * kPart < t.outputs; ++part) {
    const int64_t n = part * kPart, left = t.outputs - n, valid = left < kPart ? left : kPart;
    T* const y = static_cast<T*>(t.y) + n;
    scale_part(t, part, valid, plain ? y : static_cast<T*>(nullptr));
    if (plain) continue;
    Finish<T> o = {};
    o.sums = reinterpret_cast<const float*>(t.counts) + part * t.rows * kPart;
    if (t.residual != nullptr) o.residual = static_cast<const T*>(t.residual) + n;
    o.y = y;
    o.rows = t.rows;
    o.residual_stride = t.residual_stride;
    o.y_stride = t.y_stride;
    o.valid = valid;
    finish_panel(t.epilogue, o);
  }
}

EFFINFER_INLINE void finish_counts(const FinishTask& t) {
  with_type(t.type, [&](auto y) { finish_group<decltype(y)>(t); });
}

}  // namespace
}  // namespace effinfer
