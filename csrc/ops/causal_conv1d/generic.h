// causal_conv1d over vec.h. A part's times fall into three kinds of runs:
//   masked  y = 0
//   edge    the window reaches before the sequence or over a masked position: channels in the
//           lanes, one tap at a time, any strides (few positions)
//   inside  the window is plain x: rows.h, or times.h where time is dense
#include "ops/causal_conv1d/rows.h"
#include "ops/causal_conv1d/times.h"

namespace effinfer {
namespace {

constexpr int kMaxFastWidth = 8;  // wider filters take the edge path everywhere

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
      store_lanes(s.y + t * s.y_time + d * s.y_dim, s.y_dim, s.silu_on ? silu(sum) : sum, n);
    }
  }
}

template <int W, class X>
void inside_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  const bool times_dense = s.x_time == 1 && s.y_time == 1 && t1 - t0 >= kLanes;
  if constexpr (sizeof(X) == sizeof(float)) {
    if (times_dense)
      return s.dilation == 1 ? times_run<W, 1>(s, d0, d1, t0, t1)
                             : times_run<W, 0>(s, d0, d1, t0, t1);
    const bool channels_dense = s.x_dim == 1 && s.y_dim == 1;
    const int64_t middle = channels_dense ? d0 + (d1 - d0) / kLanes * kLanes : d0;
    rows_run<W>(s, d0, middle, t0, t1);
    blocks_run<W>(s, middle, d1, t0, t1);
  } else {
    if (times_dense && s.dilation == 1) return lines_run<W>(s, d0, d1, t0, t1);
    blocks_run<W>(s, d0, d1, t0, t1);
  }
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
