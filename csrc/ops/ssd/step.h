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

// The first `rows` <= kLanes rows; lane r of the result is y of row r. decay[r] is the row's decay,
// or with kRates its step; xd[r] is step times x. Row after row, for memory brings one stream
// faster than several, and with four sums as one would be a chain of latencies.
template <bool kRates>
__attribute__((noinline)) Vec step_rows(const StepArgs& s, int64_t rows, Vec decay, Vec xd) {
  constexpr int kSums = 4;
  constexpr int64_t kAhead = 512;  // floats: about memory's latency
  const int64_t N = s.N, full = N / kLanes * kLanes, tail = N - full;
  const float* const B = s.B;
  const float* const C = s.C;
  float decays[kLanes], xds[kLanes];
  store(decays, decay);
  store(xds, xd);
  Vec y[kLanes];
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = s.from + r * s.from_stride;
    float* const to = s.to + r * s.to_stride;
    const float* const A = kRates ? s.A + r * s.A_stride : nullptr;
    const Vec factor = splat(decays[r]), x = splat(xds[r]);
    const auto next = [&](Vec state, Vec rates, int64_t n) {
      const Vec decay = kRates ? exp(factor * rates) : factor;
      return fma(state, decay, x * load(B + n));
    };
    Vec sums[kSums] = {};
    const auto step = [&](Vec& sum, int64_t n) {
      const Vec h = next(load(from + n), kRates ? load(A + n) : Vec{}, n);
      store(to + n, h);
      sum = fma(h, load(C + n), sum);
    };
    int64_t n = 0;
    for (; n + kSums * kLanes <= full; n += kSums * kLanes) {
      for (int64_t line = 0; line < kSums * kLanes; line += 16)
        __builtin_prefetch(from + n + line + kAhead);
      EFFINFER_UNROLL
      for (int v = 0; v < kSums; ++v) step(sums[v], n + v * kLanes);
    }
    for (; n < full; n += kLanes) step(sums[0], n);
    if (tail > 0) {
      const Vec h = next(load_n(from + n, tail), kRates ? load_n(A + n, tail) : Vec{}, n);
      store_n(to + n, h, tail);
      sums[1] = fma(h, load(C + n), sums[1]);
    }
    y[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  for (int64_t r = rows; r < kLanes; ++r) y[r] = Vec{};
  return sum_rows(y);
}

}  // namespace
}  // namespace effinfer
