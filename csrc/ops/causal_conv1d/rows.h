// Inside runs with channels in the lanes. Each row of x is loaded once a tile and at once added to
// all the outputs that it is in the window of.
//   rows_run    float32, channels dense in x and y: straight from memory to memory
//   blocks_run  anything else: strips of channels pass through small dense float32 blocks in L1, in
//               steps (read in memory's own order, convolve, activate, write), for the chain of all
//               steps at once is longer than the CPU looks ahead
#pragma once
#include "ops/causal_conv1d/sequence.h"

namespace effinfer {
namespace {

constexpr int kTileRows = 4;
constexpr int64_t kBlock = 512;  // channels whose filters are transposed at once
constexpr int64_t kMaxStrip = 128, kBlockElements = 2048;  // of a block: its channels, and all
constexpr int64_t kLine = 64;                              // bytes

// The filters of n channels from d on, a vector of channels at a time.
template <int W>
struct Filters {
  Vec weight[kBlock / kLanes][W], bias[kBlock / kLanes];

  template <class X>
  Filters(const Sequence<X>& s, int64_t d, int64_t n) {
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
      const int64_t lanes = n - c < kLanes ? n - c : kLanes;
      EFFINFER_UNROLL
      for (int j = 0; j < W; ++j) weight[v][j] = load_lanes(s.weight + (d + c) * W + j, W, lanes);
      bias[v] = s.bias != nullptr ? load_lanes(s.bias + d + c, 1, lanes) : Vec{};
    }
  }
};

// N rows of one vector of channels; the window before them is at negative rows.
template <int W, int N>
EFFINFER_INLINE void tile(const float* x, int64_t x_pitch, float* y, int64_t y_pitch,
                          const Vec* weight, Vec bias, bool silu_on) {
  Vec sum[N];
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = bias;
  x -= (W - 1) * x_pitch;
  EFFINFER_UNROLL
  for (int k = 0; k < N + W - 1; ++k) {
    const Vec row = load(x);
    x += x_pitch;
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i)
      if (k >= i && k - i < W) sum[i] = fma(weight[k - i], row, sum[i]);
  }
  if (silu_on) silu_each(sum);
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) {
    store(y, sum[i]);
    y += y_pitch;
  }
}

// `rows` rows of n channels, whole vectors. Before each vector of a tile comes ahead(row, channel).
template <int W, class Ahead>
EFFINFER_INLINE void convolve_rows(const Filters<W>& filters, const float* x, int64_t x_pitch,
                                   float* y, int64_t y_pitch, int64_t rows, int64_t n, bool silu_on,
                                   Ahead ahead) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows, x += kTileRows * x_pitch, y += kTileRows * y_pitch)
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v) {
      ahead(r, c);
      tile<W, kTileRows>(x + c, x_pitch, y + c, y_pitch, filters.weight[v], filters.bias[v],
                         silu_on);
    }
  for (; r < rows; ++r, x += x_pitch, y += y_pitch)
    for (int64_t c = 0, v = 0; c < n; c += kLanes, ++v)
      tile<W, 1>(x + c, x_pitch, y + c, y_pitch, filters.weight[v], filters.bias[v], silu_on);
}

// Brings the tile's place in x and y into the cache, once a cache line.
template <class X>
EFFINFER_INLINE void prefetch_tile(const X* x, int64_t x_pitch, const X* y, int64_t y_pitch,
                                   int64_t channel) {
  if (channel * static_cast<int64_t>(sizeof(X)) % kLine != 0) return;
  EFFINFER_UNROLL
  for (int i = 0; i < kTileRows; ++i) {
    __builtin_prefetch(x + i * x_pitch + channel, 0, 2);
    __builtin_prefetch(y + i * y_pitch + channel, 1, 2);
  }
}

// A dilated filter is `dilation` plain ones, on every dilation-th row: how many of the rows t0..t1
// are of the given phase.
EFFINFER_INLINE int64_t rows_of_phase(int64_t rows, int64_t phase, int64_t dilation) {
  return (rows - phase + dilation - 1) / dilation;
}

template <int W>
void rows_run(const Sequence<float>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t x_pitch = s.x_time * s.dilation, y_pitch = s.y_time * s.dilation;
  for (int64_t d = d0; d < d1; d += kBlock) {
    const int64_t n = d1 - d < kBlock ? d1 - d : kBlock;
    const Filters<W> filters(s, d, n);
    for (int64_t phase = 0; phase < s.dilation; ++phase) {
      const float* x = s.x + (t0 + phase) * s.x_time + d;
      float* y = s.y + (t0 + phase) * s.y_time + d;
      const auto next_tile = [=](int64_t r, int64_t c) {
        const int64_t next = r + kTileRows;
        prefetch_tile(x + next * x_pitch, x_pitch, y + next * y_pitch, y_pitch, c);
      };
      convolve_rows(filters, x, x_pitch, y, y_pitch, rows_of_phase(t1 - t0, phase, s.dilation), n,
                    s.silu_on, next_tile);
    }
  }
}

EFFINFER_INLINE int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }

// body(row, channel, lanes) for each vector of a block, in the order of memory.
template <class Body>
EFFINFER_INLINE void each_vector(int64_t rows, int64_t n, int64_t dim_stride, int64_t time_stride,
                                 Body body) {
  const int64_t whole = n / kLanes * kLanes;
  if (distance(dim_stride) <= distance(time_stride)) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < whole; c += kLanes) body(r, c, kLanes);
      if (whole < n) body(r, whole, n - whole);
    }
  } else {
    for (int64_t c = 0; c < n; c += kLanes)
      for (int64_t r = 0; r < rows; ++r) body(r, c, c < whole ? kLanes : n - whole);
  }
}

template <class X>
void read_rows(float* block, int64_t pitch, const X* x, int64_t x_dim, int64_t x_pitch,
               int64_t rows, int64_t n) {
  each_vector(rows, n, x_dim, x_pitch, [=](int64_t r, int64_t c, int64_t lanes) {
    store(block + r * pitch + c, load_lanes(x + r * x_pitch + c * x_dim, x_dim, lanes));
  });
}

template <class X>
void write_rows(X* y, const float* block, int64_t pitch, int64_t y_dim, int64_t y_pitch,
                int64_t rows, int64_t n) {
  each_vector(rows, n, y_dim, y_pitch, [=](int64_t r, int64_t c, int64_t lanes) {
    store_lanes(y + r * y_pitch + c * y_dim, y_dim, load(block + r * pitch + c), lanes);
  });
}

template <int W, class X>
void blocks_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t x_pitch = s.x_time * s.dilation, y_pitch = s.y_time * s.dilation;
  const bool dense = s.x_dim == 1 && s.y_dim == 1;
  // Long in the direction in which memory runs.
  const int64_t strip = distance(s.x_dim) <= distance(s.x_time) ? kMaxStrip : kMaxStrip / 4;
  const int64_t chunk = kBlockElements / strip;
  alignas(64) float in[(W - 1) * kMaxStrip + kBlockElements], out[kBlockElements];
  float* const now = in + (W - 1) * strip;
  for (int64_t d = d0; d < d1; d += strip) {
    const int64_t n = d1 - d < strip ? d1 - d : strip;
    const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
    const Filters<W> filters(s, d, n);
    for (int64_t phase = 0; phase < s.dilation; ++phase) {
      const X* x = s.x + (t0 + phase) * s.x_time + d * s.x_dim;
      X* y = s.y + (t0 + phase) * s.y_time + d * s.y_dim;
      read_rows(in, strip, x - (W - 1) * x_pitch, s.x_dim, x_pitch, W - 1, n);
      int64_t rows = 0;
      for (int64_t left = rows_of_phase(t1 - t0, phase, s.dilation); left > 0; left -= rows) {
        rows = left < chunk ? left : chunk;
        read_rows(now, strip, x, s.x_dim, x_pitch, rows, n);
        x += rows * x_pitch;
        const X* const next_y = y + rows * y_pitch;
        const auto next_block = [=](int64_t r, int64_t c) {
          if (dense) prefetch_tile(x + r * x_pitch, x_pitch, next_y + r * y_pitch, y_pitch, c);
        };
        convolve_rows(filters, now, strip, out, strip, rows, whole, false, next_block);
        if (s.silu_on)
          for (int64_t r = 0; r < rows; ++r) activate(out + r * strip, whole);
        write_rows(y, out, strip, s.y_dim, y_pitch, rows, n);
        y += rows * y_pitch;
        std::memmove(in, in + rows * strip, static_cast<size_t>((W - 1) * strip) * sizeof(float));
      }
    }
  }
}

}  // namespace
}  // namespace effinfer
