// causal_conv1d over vec.h. A part's times fall into three kinds of runs:
//   masked  y = 0
//   edge    the window reaches before the sequence or over a masked position: channels in the
//   lanes,
//           one tap at a time, any strides (few positions, except for odd layouts)
//   inside  the window is plain x. Time-major: tiles of kTileRows rows by one vector of channels,
//   the
//           rows' window rolling through registers, so x is loaded 1 + (width-1)/kTileRows times
//           and kTileRows streams are read side by side. Channel-major: times in the lanes, one
//           unaligned load per tap.
#include "base/vec.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/causal_conv1d/lanes.h"

namespace effinfer {
namespace {

constexpr int kTileRows = 4;
constexpr int64_t kBlock = 512;   // channels whose weights are transposed at once
constexpr int64_t kAhead = 512;   // elements that channel-major prefetches ahead
constexpr int kMaxFastWidth = 8;  // wider filters take the edge path everywhere

// One sequence: pointers at its first position.
template <class X>
struct Sequence {
  const X* x;
  X* y;
  const uint8_t* mask;   // or null
  const float* initial;  // or null
  const float* weight;
  const float* bias;
  int64_t x_dim, x_time, y_dim, y_time, mask_time, initial_dim, initial_column;
  int64_t dim, length, width, dilation, past;
  bool silu_on;

  Sequence(const CausalConv1d& a, int64_t sequence)
      : weight(a.weight),
        bias(a.bias),
        x_dim(a.x_dim),
        x_time(a.x_time),
        y_dim(a.y_dim),
        y_time(a.y_time),
        mask_time(a.mask_time),
        initial_dim(a.initial_dim),
        initial_column(a.initial_column),
        dim(a.dim),
        width(a.width),
        dilation(a.dilation),
        past((a.width - 1) * a.dilation),
        silu_on(a.silu) {
    const bool packed = a.cu_seqlens != nullptr;
    const int64_t row = packed ? 0 : sequence, begin = packed ? a.cu_seqlens[sequence] : 0;
    length = packed ? a.cu_seqlens[sequence + 1] - begin : a.length;
    x = static_cast<const X*>(a.x) + row * a.x_batch + begin * x_time;
    y = static_cast<X*>(a.y) + row * a.y_batch + begin * y_time;
    mask = a.mask != nullptr ? a.mask + row * a.mask_batch + begin * mask_time : nullptr;
    initial =
        a.initial_state != nullptr ? a.initial_state + sequence * a.initial_sequence : nullptr;
  }

  bool masked(int64_t t) const { return mask != nullptr && mask[t * mask_time] == 0; }

  // Whether the window of time t holds nothing but x.
  bool is_inside(int64_t t) const {
    if (t < past) return false;
    if (mask == nullptr) return true;
    for (int64_t back = 0; back <= past; back += dilation)
      if (masked(t - back)) return false;
    return true;
  }

  // Column t >= -past of [initial_state | x], channels d.. in the lanes.
  EFFINFER_INLINE Vec column(int64_t t, int64_t d, int64_t n) const {
    if (t >= 0) return masked(t) ? Vec{} : load_lanes(x + t * x_time + d * x_dim, x_dim, n);
    if (initial == nullptr) return Vec{};
    return load_lanes(initial + (past + t) * initial_column + d * initial_dim, initial_dim, n);
  }

  EFFINFER_INLINE Vec activate(Vec sum) const { return silu_on ? silu(sum) : sum; }
};

template <class X>
void zero_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t d = d0; d < d1; d += kLanes)
      store_lanes(s.y + t * s.y_time + d * s.y_dim, s.y_dim, Vec{},
                  d1 - d < kLanes ? d1 - d : kLanes);
}

template <class X>
void edge_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t width = s.width, dilation = s.dilation;
  for (int64_t d = d0; d < d1; d += kLanes) {
    const int64_t n = d1 - d < kLanes ? d1 - d : kLanes;
    const Vec bias = s.bias != nullptr ? load_lanes(s.bias + d, 1, n) : Vec{};
    for (int64_t t = t0; t < t1; ++t) {
      Vec sum = bias;
      for (int64_t j = 0; j < width; ++j)
        sum = fma(load_lanes(s.weight + d * width + j, width, n),
                  s.column(t - (width - 1 - j) * dilation, d, n), sum);
      store_lanes(s.y + t * s.y_time + d * s.y_dim, s.y_dim, s.activate(sum), n);
    }
  }
}

// N rows of one vector of channels; the window before them is at negative rows. Each row is loaded
// once, and at once added to all the outputs that it is in the window of.
template <int W, int N, class X>
EFFINFER_INLINE void tile(const X* x, int64_t x_pitch, X* y, int64_t y_pitch, const Vec* weight,
                          Vec bias, bool silu_on) {
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
  if (N == kTileRows) {  // the next tile, one block's width of loads ahead
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) {
      __builtin_prefetch(x + i * x_pitch, 0, 2);
      __builtin_prefetch(y + (N + i) * y_pitch, 1, 2);
    }
  }
  if (silu_on) silu_each(sum);
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) {
    store(y, sum[i]);
    y += y_pitch;
  }
}

// Time-major; d1 - d0 >= kLanes. A dilated filter is `dilation` plain ones, on every dilation-th
// row.
template <int W, class X>
void rows_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t x_pitch = s.x_time * s.dilation, y_pitch = s.y_time * s.dilation;
  const bool silu_on = s.silu_on;
  for (int64_t block = d0; block < d1; block += kBlock) {
    const int64_t first = block + kLanes > d1 ? d1 - kLanes : block;  // the last may overlap
    const int64_t n = d1 - first < kBlock ? d1 - first : kBlock;
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    const auto offset = [&](int64_t v) {  // of vector v; the last may overlap the one before
      return v * kLanes + kLanes > n ? n - kLanes : v * kLanes;
    };
    Vec weight[kBlock / kLanes][W], bias[kBlock / kLanes];
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t d = first + offset(v);
      EFFINFER_UNROLL
      for (int j = 0; j < W; ++j) weight[v][j] = load_strided(s.weight + d * W + j, W);
      bias[v] = s.bias != nullptr ? load(s.bias + d) : Vec{};
    }
    for (int64_t phase = 0; phase < s.dilation; ++phase) {
      const X* x = s.x + (t0 + phase) * s.x_time + first;
      X* y = s.y + (t0 + phase) * s.y_time + first;
      int64_t left = (t1 - t0 - phase + s.dilation - 1) / s.dilation;
      for (; left >= kTileRows; left -= kTileRows) {
        for (int64_t v = 0; v < vectors; ++v)
          tile<W, kTileRows>(x + offset(v), x_pitch, y + offset(v), y_pitch, weight[v], bias[v],
                             silu_on);
        x += kTileRows * x_pitch;
        y += kTileRows * y_pitch;
      }
      for (; left > 0; --left, x += x_pitch, y += y_pitch)
        for (int64_t v = 0; v < vectors; ++v)
          tile<W, 1>(x + offset(v), x_pitch, y + offset(v), y_pitch, weight[v], bias[v], silu_on);
    }
  }
}

// N vectors of times of one channel, y[0] the first.
template <int W, int N, class X>
EFFINFER_INLINE void stretch(const X* x, X* y, int64_t dilation, const Vec* weight, Vec bias,
                             bool silu_on) {
  Vec sum[N];
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) sum[i] = bias;
  EFFINFER_UNROLL
  for (int j = 0; j < W; ++j) {
    const X* tap = x - (W - 1 - j) * dilation;
    EFFINFER_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = fma(weight[j], load(tap + i * kLanes), sum[i]);
  }
  if (N > 1) {
    EFFINFER_UNROLL
    for (int i = 0; i < N; i += 64 / static_cast<int>(sizeof(X)) / kLanes + (kLanes > 16)) {
      __builtin_prefetch(x + kAhead + i * kLanes, 0, 2);
      __builtin_prefetch(y + kAhead + i * kLanes, 1, 2);
    }
  }
  if (silu_on) silu_each(sum);
  EFFINFER_UNROLL
  for (int i = 0; i < N; ++i) store(y + i * kLanes, sum[i]);
}

// Channel-major; t1 - t0 >= kLanes.
template <int W, int Dilation, class X>
void times_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const int64_t dilation = Dilation > 0 ? Dilation : s.dilation;
  const bool silu_on = s.silu_on;
  for (int64_t d = d0; d < d1; ++d) {
    Vec weight[W];
    EFFINFER_UNROLL
    for (int j = 0; j < W; ++j) weight[j] = splat(s.weight[d * W + j]);
    const Vec bias = splat(s.bias != nullptr ? s.bias[d] : 0.f);
    const X* x = s.x + d * s.x_dim;
    X* y = s.y + d * s.y_dim;
    int64_t t = t0;
    for (; t + kTileRows * kLanes <= t1; t += kTileRows * kLanes)
      stretch<W, kTileRows>(x + t, y + t, dilation, weight, bias, silu_on);
    for (; t + kLanes <= t1; t += kLanes)
      stretch<W, 1>(x + t, y + t, dilation, weight, bias, silu_on);
    if (t < t1)  // overlaps the one before
      stretch<W, 1>(x + t1 - kLanes, y + t1 - kLanes, dilation, weight, bias, silu_on);
  }
}

template <int W, class X>
void inside_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  if (s.x_dim == 1 && s.y_dim == 1 && d1 - d0 >= kLanes) return rows_run<W>(s, d0, d1, t0, t1);
  if (s.x_time == 1 && s.y_time == 1 && t1 - t0 >= kLanes)
    return s.dilation == 1 ? times_run<W, 1>(s, d0, d1, t0, t1)
                           : times_run<W, 0>(s, d0, d1, t0, t1);
  edge_run(s, d0, d1, t0, t1);
}

template <class X>
auto inside_run_for(int64_t width) {
  using Run = void (*)(const Sequence<X>&, int64_t, int64_t, int64_t, int64_t);
  constexpr Run kRuns[] = {inside_run<2, X>, inside_run<3, X>, inside_run<4, X>, inside_run<5, X>,
                           inside_run<6, X>, inside_run<7, X>, inside_run<8, X>};
  return width >= 2 && width <= kMaxFastWidth ? kRuns[width - 2] : Run{edge_run<X>};
}

template <class X>
void write_states(const Sequence<X>& s, const CausalConv1d& a, const CausalConv1dPart& part) {
  const int64_t past = s.past;
  for (int64_t k = 0; k < a.num_states; ++k) {
    float* state = a.states + (part.sequence * a.num_states + k) * s.dim * past;
    const int64_t oldest = (s.length > k ? s.length - k : 0) - past;
    for (int64_t d = part.dim_begin; d < part.dim_end; d += kLanes) {
      const int64_t n = part.dim_end - d < kLanes ? part.dim_end - d : kLanes;
      for (int64_t c = 0; c < past; ++c)
        store_lanes(state + d * past + c, past, s.column(oldest + c, d, n), n);
    }
  }
}

template <class X>
void convolve(const CausalConv1d& a, const CausalConv1dPart& part) {
  const Sequence<X> s(a, part.sequence);
  const auto inside = inside_run_for<X>(s.width);
  const auto kind = [&](int64_t t) { return s.masked(t) ? 0 : s.is_inside(t) ? 2 : 1; };
  for (int64_t t = part.begin; t < part.end;) {
    const int here = kind(t);
    int64_t end = t + 1;
    if (s.mask == nullptr)
      end = here == 2 || part.end < s.past ? part.end : s.past;
    else
      while (end < part.end && kind(end) == here) ++end;
    (here == 0   ? zero_run<X>
     : here == 1 ? edge_run<X>
                 : inside)(s, part.dim_begin, part.dim_end, t, end);
    t = end;
  }
  if (part.end >= s.length) write_states(s, a, part);
}

void dispatch(const CausalConv1d& a, const CausalConv1dPart& part) {
  with_type(a.type, [&](auto x) { convolve<decltype(x)>(a, part); });
}

}  // namespace
}  // namespace effinfer
