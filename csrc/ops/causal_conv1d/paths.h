// Runs of positions, by layout:
//   rows_run    float32, channels dense in x and y: straight from memory to memory, channels in the
//               lanes
//   times_run   times dense: times in the lanes; float32 straight from memory to memory, 16-bit
//               types widened once, not once a tap, into a line of float32 that stays in L1
//   blocks_run  anything else, and edges: strips of channels pass through small dense blocks of
//               float32 in L1, read and written in memory's own order
#pragma once
#include "ops/causal_conv1d/sequence.h"
#include "ops/causal_conv1d/widths.h"

namespace effinfer {
namespace {

constexpr int64_t kBlock = 2048;  // channels whose filters are transposed at once
constexpr int64_t kMaxStrip = 128, kBlockElements = 2048;  // of a block: its channels, and all
constexpr int64_t kAhead = 512;                            // times to prefetch ahead
constexpr int64_t kLineTimes = 1024, kLinePast = 256;      // of a line of float32

template <class X>
const char* bytes(const X* p) {
  return reinterpret_cast<const char*>(p);
}

// x and y where memory is wanted next, in steps of `times`.
template <class X>
Ahead ahead_at(const Sequence<X>& s, const X* x, X* y, int64_t times) {
  const int64_t size = sizeof(X);
  return {.x = bytes(x),
          .y = bytes(y),
          .x_time = s.x_time * times * size,
          .y_time = s.y_time * times * size,
          .x_dim = s.x_dim * size,
          .y_dim = s.y_dim * size};
}

EFFINFER_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

EFFINFER_INLINE int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }

// A dilated filter is `dilation` plain ones, on every dilation-th row: how many of `rows` rows are
// of the given phase.
EFFINFER_INLINE int64_t rows_of_phase(int64_t rows, int64_t phase, int64_t dilation) {
  return (rows - phase + dilation - 1) / dilation;
}

// The filters of n channels from d on, as Rows wants them.
void read_filters(Vec* to, const float* weight, const float* bias, int64_t width, int64_t d,
                  int64_t n) {
  for (int64_t c = d; c < d + n; c += kLanes) {
    const int64_t lanes = d + n - c < kLanes ? d + n - c : kLanes;
    *to++ = bias != nullptr ? load_lanes(bias + c, 1, lanes) : Vec{};
    for (int64_t j = 0; j < width; ++j) *to++ = load_lanes(weight + c * width + j, width, lanes);
  }
}

void rows_run(const Sequence<float>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t x_pitch = s.x_time * s.dilation, y_pitch = s.y_time * s.dilation;
  const auto run = loops_of(s.width).rows;
  Vec filters[kBlock / kLanes * (1 + kMaxWidth)];
  for (int64_t d = d0; d < d1; d += kBlock) {
    const int64_t n = d1 - d < kBlock ? d1 - d : kBlock;
    read_filters(filters, s.weight, s.bias, s.width, d, n);
    for (int64_t phase = 0; phase < s.dilation; ++phase) {
      const float* x = s.x + (t0 + phase) * s.x_time + d;
      float* y = s.y + (t0 + phase) * s.y_time + d;
      run({x, y, filters, x_pitch, y_pitch, rows_of_phase(t1 - t0, phase, s.dilation), n, s.silu_on,
           ahead_at(s, x + kTileRows * x_pitch, y + kTileRows * y_pitch, s.dilation)});
    }
  }
}

// n elements, n >= kLanes, from one type to another; the last vector overlaps the one before.
template <class To, class From>
void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  store(to + n - kLanes, load(from + n - kLanes));
}

// Columns [t - past, t + n) of channel d, n >= kLanes, time dense and nothing masked.
template <class X>
void read_line(float* line, const Sequence<X>& s, int64_t d, int64_t t, int64_t n) {
  int64_t from = t - s.past;
  for (; from < 0; ++from)
    *line++ = s.initial != nullptr
                  ? s.initial[(s.past + from) * s.initial_column + d * s.initial_dim]
                  : 0.f;
  convert(line, s.x + d * s.x_dim + from, t + n - from);
}

template <class X>
void times_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  constexpr bool kDirect = sizeof(X) == sizeof(float);
  const auto run = loops_of(s.width).times;
  alignas(64) float line[kLinePast + kLineTimes + kLanes], out[kLineTimes + kLanes];
  for (int64_t d = d0; d < d1; ++d) {
    const float* weight = s.weight + d * s.width;
    const float bias = s.bias != nullptr ? s.bias[d] : 0.f;
    for (int64_t t = t0, n; t < t1; t += n) {
      // What is left after a whole line is a whole vector at least.
      n = kDirect || t1 - t < kLineTimes + kLanes ? t1 - t : kLineTimes;
      const X* x = s.x + d * s.x_dim + t;
      X* y = s.y + d * s.y_dim + t;
      const char *const x_ahead = bytes(x + kAhead), *const y_ahead = bytes(y + kAhead);
      if constexpr (kDirect) {
        run({x, y, weight, bias, n, s.dilation, s.silu_on, x_ahead, y_ahead, sizeof(X)});
      } else {
        read_line(line, s, d, t, n);
        run({line + s.past, out, weight, bias, n, s.dilation, s.silu_on, x_ahead, y_ahead,
             sizeof(X)});
        convert(y, out, n);
      }
    }
  }
}

// Whether times_run can do [t0, t1), where no mask is in the way: edges only through a line.
template <class X>
bool times_fit(const Sequence<X>& s, int64_t t0, int64_t t1) {
  const bool fit = sizeof(X) == sizeof(float) ? t0 >= s.past : s.past <= kLinePast;
  return fit && s.x_time == 1 && s.y_time == 1 && t1 - t0 >= kLanes;
}

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

// Rows of columns t, t + s.dilation, ..
template <class X>
void read_rows(float* block, int64_t pitch, const Sequence<X>& s, int64_t t, int64_t d,
               int64_t rows, int64_t n) {
  const bool plain = t >= 0 && s.mask == nullptr;
  const X* x = s.x + t * s.x_time + d * s.x_dim;
  const int64_t x_dim = s.x_dim, x_pitch = s.x_time * s.dilation;
  each_vector(rows, n, x_dim, x_pitch, [=, &s](int64_t r, int64_t c, int64_t lanes) {
    store(block + r * pitch + c, plain ? load_lanes(x + r * x_pitch + c * x_dim, x_dim, lanes)
                                       : s.column(t + r * s.dilation, d + c, lanes));
  });
}

template <class X>
void write_rows(X* y, const float* block, int64_t pitch, int64_t y_dim, int64_t y_pitch,
                int64_t rows, int64_t n) {
  each_vector(rows, n, y_dim, y_pitch, [=](int64_t r, int64_t c, int64_t lanes) {
    store_lanes(y + r * y_pitch + c * y_dim, y_dim, load(block + r * pitch + c), lanes);
  });
}

template <class X>
void blocks_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t y_pitch = s.y_time * s.dilation, before = s.width - 1;
  const auto run = loops_of(s.width).rows;
  // Long in the direction in which memory runs.
  const int64_t strip = distance(s.x_dim) <= distance(s.x_time) ? kMaxStrip : kMaxStrip / 4;
  const int64_t chunk = kBlockElements / strip;
  alignas(64) float in[(kMaxWidth - 1) * kMaxStrip + kBlockElements], out[kBlockElements];
  Vec filters[kMaxStrip / kLanes * (1 + kMaxWidth)];
  float* const now = in + before * strip;
  for (int64_t d = d0; d < d1; d += strip) {
    const int64_t n = d1 - d < strip ? d1 - d : strip;
    const int64_t whole = round_up(n, kLanes);
    read_filters(filters, s.weight, s.bias, s.width, d, n);
    for (int64_t phase = 0; phase < s.dilation; ++phase) {
      int64_t t = t0 + phase, rows = 0;
      X* y = s.y + t * s.y_time + d * s.y_dim;
      read_rows(in, strip, s, t - s.past, d, before, n);
      for (int64_t left = rows_of_phase(t1 - t0, phase, s.dilation); left > 0; left -= rows) {
        rows = left < chunk ? left : chunk;
        read_rows(now, strip, s, t, d, rows, n);
        t += rows * s.dilation;
        const X* x = s.x + t * s.x_time + d * s.x_dim;  // of the next block
        run({now, out, filters, strip, strip, rows, whole, s.silu_on,
             ahead_at(s, x, y + rows * y_pitch, s.dilation)});
        write_rows(y, out, strip, s.y_dim, y_pitch, rows, n);
        y += rows * y_pitch;
        std::memmove(in, in + rows * strip, static_cast<size_t>(before * strip) * sizeof(float));
      }
    }
  }
}

template <class X>
void inside_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  if (times_fit(s, t0, t1)) return times_run(s, d0, d1, t0, t1);
  int64_t middle = d0;
  if constexpr (sizeof(X) == sizeof(float))
    if (s.x_dim == 1 && s.y_dim == 1) {
      middle = d0 + (d1 - d0) / kLanes * kLanes;
      rows_run(s, d0, middle, t0, t1);
    }
  blocks_run(s, middle, d1, t0, t1);
}

}  // namespace
}  // namespace effinfer
