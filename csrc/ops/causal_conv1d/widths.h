// The inner loops, float32 in and out, compiled once for each common width; everything about types,
// strides, edges and masks stays with their callers in paths.h. A filter is a vector of biases,
// then one of weights for each tap, oldest first.
#pragma once
#include "base/vec.h"

namespace effinfer {
namespace {

constexpr int kMinWidth = 2, kMaxWidth = 8;
constexpr int kMaxFilter = 1 + kMaxWidth;          // vectors
constexpr int kTileRows = 4, kStretchVectors = 2;  // vectors computed at once, for their latencies
constexpr int64_t kStretch = kStretchVectors * kLanes;
constexpr int64_t kLine = 64;  // bytes

// What the caller reads and writes next: brought into the cache on the way. In bytes.
struct Ahead {
  const char* x;
  const char* y;
  int64_t x_time, y_time, x_dim, y_dim;
};

// `rows` rows of n channels, whole vectors; the window before them is at negative rows.
struct Rows {
  const float* x;
  float* y;
  const Vec* filters;  // of each vector of channels: its biases, then its weights tap by tap
  int64_t x_pitch, y_pitch, rows, n;
  bool silu_on;
  Ahead ahead;
};

// N vectors of sums that belong `pitch` apart. silu is a long chain of dependent steps, so they are
// activated and stored only after the taps of the next N, which the CPU then computes meanwhile.
template <int N>
struct Late {
  Vec sum[N] = {};
  float* y;  // before the first sums a place that is written again later
  int64_t pitch;
  bool silu_on;

  EFFINFER_INLINE void finish() {
    if (silu_on) silu_each(sum);
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) store(y + i * pitch, sum[i]);
  }

  EFFINFER_INLINE void follow(const Vec (&next)[N], float* next_y) {
    finish();
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = next[i];
    y = next_y;
  }
};

// N rows of one vector of channels. Each row is loaded once and at once added to all the sums that
// it is in the window of.
template <int W, int N>
EFFINFER_INLINE void sum_rows(Vec (&sum)[N], const float* x, int64_t pitch, const Vec* filter) {
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = filter[0];
  x -= (W - 1) * pitch;
  EFFINFER_UNROLL
  for (int k = 0; k < N + W - 1; ++k) {
    const Vec row = load(x);
    x += pitch;
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i)
      if (k >= i && k - i < W) sum[i] = fma(filter[1 + k - i], row, sum[i]);
  }
}

template <int W>
void convolve_rows(const Rows& a) {
  const float* x = a.x;
  float* y = a.y;
  const int64_t x_pitch = a.x_pitch, y_pitch = a.y_pitch, n = a.n, rows = a.rows;
  const bool silu_on = a.silu_on;
  const Ahead ahead = a.ahead;
  int64_t row = 0;
  if (rows >= kTileRows) {
    Late<kTileRows> late = {.y = y, .pitch = y_pitch, .silu_on = silu_on};
    for (; row + kTileRows <= rows; row += kTileRows) {
      const Vec* filter = a.filters;
      for (int64_t c = 0; c < n; c += kLanes, filter += 1 + W) {
        if (c * ahead.x_dim % kLine == 0) {
          EFFINFER_UNROLL
          for (int i = 0; i < kTileRows; ++i) {
            __builtin_prefetch(ahead.x + (row + i) * ahead.x_time + c * ahead.x_dim, 0, 2);
            __builtin_prefetch(ahead.y + (row + i) * ahead.y_time + c * ahead.y_dim, 1, 2);
          }
        }
        Vec sum[kTileRows];
        sum_rows<W>(sum, x + c, x_pitch, filter);
        late.follow(sum, y + c);
      }
      x += kTileRows * x_pitch;
      y += kTileRows * y_pitch;
    }
    late.finish();
  }
  for (; row < rows; ++row, x += x_pitch, y += y_pitch) {
    const Vec* filter = a.filters;
    for (int64_t c = 0; c < n; c += kLanes, filter += 1 + W) {
      Vec sum[1];
      sum_rows<W>(sum, x + c, x_pitch, filter);
      store(y + c, silu_on ? silu(sum[0]) : sum[0]);
    }
  }
}

// n >= kLanes times of one channel, one unaligned load a tap.
struct Times {
  const float* x;
  float* y;
  const float* weight;
  float bias;
  int64_t n, dilation;
  bool silu_on;
  const char *x_ahead, *y_ahead;  // as Ahead
  int64_t element;  // bytes: registers are scarce here, and an Ahead takes 10 % longer
};

// N vectors of times.
template <int W, int N>
EFFINFER_INLINE void sum_times(Vec (&sum)[N], const float* x, int64_t dilation,
                               const Vec (&weight)[W], Vec bias) {
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = bias;
  const float* tap = x - (W - 1) * dilation;
  EFFINFER_UNROLL
  for (int j = 0; j < W; ++j) {
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = fma(weight[j], load(tap + i * kLanes), sum[i]);
    tap += dilation;
    asm("" : "+r"(tap));  // or else gcc keeps N W pointers, most of them on the stack
  }
}

template <int W>
void convolve_times(const Times& a) {
  const float* x = a.x;
  float* y = a.y;
  const int64_t n = a.n, dilation = a.dilation;
  const bool silu_on = a.silu_on;
  const char *const x_ahead = a.x_ahead, *const y_ahead = a.y_ahead;
  const int64_t element = a.element;
  const Vec bias = splat(a.bias);
  Vec weight[W];
  EFFINFER_UNROLL
  for (int j = 0; j < W; ++j) weight[j] = splat(a.weight[j]);
  if (n < kStretch) {
    for (int64_t t = 0; t < n; t += kLanes) {
      if (t > n - kLanes) t = n - kLanes;  // the last one overlaps the one before
      Vec sum[1];
      sum_times(sum, x + t, dilation, weight, bias);
      store(y + t, silu_on ? silu(sum[0]) : sum[0]);
    }
    return;
  }
  Late<kStretchVectors> late = {.y = y, .pitch = kLanes, .silu_on = silu_on};
  for (int64_t t = 0; t < n; t += kStretch) {
    if (t > n - kStretch) t = n - kStretch;
    EFFINFER_UNROLL
    for (int64_t line = 0; line < kStretch * 4; line += kLine) {
      __builtin_prefetch(x_ahead + t * element + line, 0, 2);
      __builtin_prefetch(y_ahead + t * element + line, 1, 2);
    }
    Vec sum[kStretchVectors];
    sum_times(sum, x + t, dilation, weight, bias);
    late.follow(sum, y + t);
  }
  late.finish();
}

struct WidthLoops {
  void (*rows)(const Rows&);
  void (*times)(const Times&);
};

template <int W>
constexpr WidthLoops kWidthLoops = {convolve_rows<W>, convolve_times<W>};

// Of a width between kMinWidth and kMaxWidth.
WidthLoops loops_of(int64_t width) {
  constexpr WidthLoops kLoops[] = {kWidthLoops<2>, kWidthLoops<3>, kWidthLoops<4>, kWidthLoops<5>,
                                   kWidthLoops<6>, kWidthLoops<7>, kWidthLoops<8>};
  return kLoops[width - kMinWidth];
}

}  // namespace
}  // namespace effinfer
