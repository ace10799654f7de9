// One token through some rows of a matrix state: S = decay S + xd (outer) B, y = S C. Shared by the
// recurrent path of ssd and by ssd_state_update.
#pragma once
#include "base/vec.h"
#include "ops/scan/transpose.h"

namespace effinfer {
namespace {

// What a decay is one value for.
enum class Decay { kHead, kRow, kElement };

// Rows of the state, N along each; `from` may be `to`.
template <class T>
struct StepArgs {
  const float* from;
  float* to;
  int64_t from_stride, to_stride;  // between rows
  int64_t N;
  const T* B;
  const T* C;
  const float* A;    // kElement only: rates of the first row, dense along N
  int64_t A_stride;  // between rows
};

// R rows. decay[r] is the row's decay, or for kElement its step; xd[r] is step times x. Returns the
// unreduced sums of y in y[r].
template <int R, Decay kDecay, class T>
EFFINFER_INLINE void step_some(const StepArgs<T>& s, int64_t row, const float* decay,
                               const float* xd, Vec* y) {
  const int64_t N = s.N, from_stride = s.from_stride, to_stride = s.to_stride;
  const float* const from = s.from + row * from_stride;
  float* const to = s.to + row * to_stride;
  const float* const A = kDecay == Decay::kElement ? s.A + row * s.A_stride : nullptr;
  const int64_t A_stride = s.A_stride;
  const T* const B = s.B;
  const T* const C = s.C;
  Vec x[R], a[R], sums[R];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    x[r] = splat(xd[r]);
    a[r] = splat(decay[r]);
    sums[r] = Vec{};
  }
  const auto factor = [&](int r, Vec rates) {
    if constexpr (kDecay == Decay::kElement) return exp(a[r] * rates);
    return kDecay == Decay::kHead ? a[0] : a[r];
  };
  const int64_t full = N / kLanes * kLanes;
  for (int64_t n = 0; n < full; n += kLanes) {
    const Vec b = load(B + n), c = load(C + n);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec rates{};
      if constexpr (kDecay == Decay::kElement) rates = load(A + r * A_stride + n);
      const Vec h = fma(load(from + r * from_stride + n), factor(r, rates), x[r] * b);
      store(to + r * to_stride + n, h);
      sums[r] = fma(h, c, sums[r]);
    }
  }
  if (full < N) {
    const int64_t tail = N - full;
    const Vec b = load_n(B + full, tail), c = load_n(C + full, tail);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec rates{};
      if constexpr (kDecay == Decay::kElement) rates = load_n(A + r * A_stride + full, tail);
      const Vec h = fma(load_n(from + r * from_stride + full, tail), factor(r, rates), x[r] * b);
      store_n(to + r * to_stride + full, h, tail);
      sums[r] = fma(h, c, sums[r]);
    }
  }
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) y[r] = sums[r];
}

// The first `rows` <= kLanes rows; lane r of the result is y of row r.
template <Decay kDecay, class T>
EFFINFER_INLINE Vec step_rows(const StepArgs<T>& s, int64_t rows, Vec decay, Vec xd) {
  float decays[kLanes], xds[kLanes];
  store(decays, decay);
  store(xds, xd);
  Vec y[kLanes] = {};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) step_some<4, kDecay>(s, r, decays + r, xds + r, y + r);
  for (; r < rows; ++r) step_some<1, kDecay>(s, r, decays + r, xds + r, y + r);
  return sum_rows(y);
}

}  // namespace
}  // namespace effinfer
