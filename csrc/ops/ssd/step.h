// One token through some rows of a matrix state: S = decay S + xd (outer) B, y = S C. Shared by the
// recurrent path of ssd and by ssd_state_update.
#pragma once
#include "base/vec.h"
#include "ops/scan/transpose.h"

namespace effinfer {
namespace {

// Rows of the state, N along each; `from` may be `to`. B and C are zero up to whole vectors.
struct StepArgs {
  const float* from;
  float* to;
  int64_t from_stride, to_stride;  // between rows
  int64_t N;
  const float* B;
  const float* C;
  const float* A;    // rates of the first row, dense along N, with kRates
  int64_t A_stride;  // between rows
};

// R rows. decay[r] is the row's decay, or with kRates its step; xd[r] is step times x. Leaves the
// unreduced sums of y in y[r].
template <int R, bool kRates>
EFFINFER_INLINE void step_some(const StepArgs& s, int64_t row, const float* decay, const float* xd,
                               Vec* y) {
  const int64_t N = s.N, from_stride = s.from_stride, to_stride = s.to_stride;
  const int64_t A_stride = s.A_stride;
  const float* const from = s.from + row * from_stride;
  float* const to = s.to + row * to_stride;
  const float* const A = kRates ? s.A + row * A_stride : nullptr;
  const float* const B = s.B;
  const float* const C = s.C;
  Vec x[R], a[R], sums[R];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    x[r] = splat(xd[r]);
    a[r] = splat(decay[r]);
    sums[r] = Vec{};
  }
  const int64_t full = N / kLanes * kLanes, tail = N - full;
  for (int64_t n = 0; n < full; n += kLanes) {
    const Vec b = load(B + n), c = load(C + n);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      Vec factor = a[r];
      if constexpr (kRates) factor = exp(a[r] * load(A + r * A_stride + n));
      const Vec h = fma(load(from + r * from_stride + n), factor, x[r] * b);
      store(to + r * to_stride + n, h);
      sums[r] = fma(h, c, sums[r]);
    }
  }
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) y[r] = sums[r];
  for (int r = 0; r < R && tail > 0; ++r) {
    Vec factor = splat(decay[r]);
    if constexpr (kRates) factor = exp(factor * load_n(A + r * A_stride + full, tail));
    const Vec h =
        fma(load_n(from + r * from_stride + full, tail), factor, splat(xd[r]) * load(B + full));
    store_n(to + r * to_stride + full, h, tail);
    y[r] = fma(h, load(C + full), y[r]);
  }
}

// The first `rows` <= kLanes rows; lane r of the result is y of row r.
template <bool kRates>
__attribute__((noinline)) Vec step_rows(const StepArgs& s, int64_t rows, Vec decay, Vec xd) {
  float decays[kLanes], xds[kLanes];
  store(decays, decay);
  store(xds, xd);
  Vec y[kLanes];
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) step_some<4, kRates>(s, r, decays + r, xds + r, y + r);
  for (; r < rows; ++r) step_some<1, kRates>(s, r, decays + r, xds + r, y + r);
  for (; r < kLanes; ++r) y[r] = Vec{};
  return sum_rows(y);
}

}  // namespace
}  // namespace effinfer
