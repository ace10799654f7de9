// Inside runs with times in the lanes, for channel-major memory: one unaligned load per tap.
// float32 goes straight from memory to memory; 16-bit types are widened once, not once a tap, into
// a line of float32 that stays in L1, convolved there, activated and written in steps.
#pragma once
#include "ops/causal_conv1d/sequence.h"

namespace effinfer {
namespace {

constexpr int kStretch = 4;       // vectors of times at once
constexpr int64_t kAhead = 512;   // elements to prefetch ahead
constexpr int64_t kTimes = 1024;  // of a line

// N vectors of times of one channel, y[0] the first.
template <int W, int N>
EFFINFER_INLINE void stretch(const float* x, float* y, int64_t dilation, const Vec* weight,
                             Vec bias, bool silu_on) {
  Vec sum[N];
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = bias;
  EFFINFER_UNROLL
  for (int j = 0; j < W; ++j) {
    const float* tap = x - (W - 1 - j) * dilation;
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = fma(weight[j], load(tap + i * kLanes), sum[i]);
  }
  if (silu_on) silu_each(sum);
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) store(y + i * kLanes, sum[i]);
}

// One channel's filter, in all lanes.
template <int W>
struct Filter {
  Vec weight[W], bias;

  template <class X>
  Filter(const Sequence<X>& s, int64_t d) : bias(splat(s.bias != nullptr ? s.bias[d] : 0.f)) {
    EFFINFER_UNROLL
    for (int j = 0; j < W; ++j) weight[j] = splat(s.weight[d * W + j]);
  }
};

// n >= kLanes times of one channel; x and y as they lie in memory are prefetched further on.
template <int W, class X>
EFFINFER_INLINE void convolve_times(const Filter<W>& filter, const float* x, float* y, int64_t n,
                                    int64_t dilation, bool silu_on, const X* x_memory,
                                    const X* y_memory) {
  int64_t t = 0;
  for (; t + kStretch * kLanes <= n; t += kStretch * kLanes) {
    EFFINFER_UNROLL
    for (int i = 0; i < kStretch * kLanes; i += 64 / static_cast<int>(sizeof(X))) {
      __builtin_prefetch(x_memory + t + kAhead + i, 0, 2);
      __builtin_prefetch(y_memory + t + kAhead + i, 1, 2);
    }
    stretch<W, kStretch>(x + t, y + t, dilation, filter.weight, filter.bias, silu_on);
  }
  for (; t + kLanes <= n; t += kLanes)
    stretch<W, 1>(x + t, y + t, dilation, filter.weight, filter.bias, silu_on);
  if (t < n)  // overlaps the one before
    stretch<W, 1>(x + n - kLanes, y + n - kLanes, dilation, filter.weight, filter.bias, silu_on);
}

template <int W, int Dilation>
void times_run(const Sequence<float>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  for (int64_t d = d0; d < d1; ++d) {
    const float* x = s.x + d * s.x_dim + t0;
    float* y = s.y + d * s.y_dim + t0;
    convolve_times(Filter<W>(s, d), x, y, t1 - t0, Dilation > 0 ? Dilation : s.dilation, s.silu_on,
                   x, y);
  }
}

// n elements, n >= kLanes, from one type to another; the last vector overlaps the one before.
template <class To, class From>
EFFINFER_INLINE void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  store(to + n - kLanes, load(from + n - kLanes));
}

// Without dilation.
template <int W, class X>
void lines_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  alignas(64) float line[W - 1 + kTimes + kLanes], out[kTimes + kLanes];
  for (int64_t d = d0; d < d1; ++d) {
    const Filter<W> filter(s, d);
    for (int64_t t = t0, n; t < t1; t += n) {
      // What is left after a whole line is a whole vector at least.
      n = t1 - t < kTimes + kLanes ? t1 - t : kTimes;
      const X* x = s.x + d * s.x_dim + t;
      X* y = s.y + d * s.y_dim + t;
      convert(line, x - (W - 1), n + W - 1);
      convolve_times(filter, line + W - 1, out, n, 1, false, x, y);
      if (s.silu_on) activate(out, n);
      convert(y, out, n);
    }
  }
}

}  // namespace
}  // namespace effinfer
