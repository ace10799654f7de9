// causal_conv1d over vec.h. A part's times fall into three kinds of runs:
//   masked  y = 0
//   edge    the window reaches before the sequence or over a masked position (few times)
//   inside  the window is plain x
#include <array>

#include "ops/causal_conv1d/paths.h"

namespace effinfer {
namespace {

enum Kind { kMasked, kEdge, kInside };

template <class X>
void zero_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t d = d0; d < d1; d += kLanes)
      store_lanes(s.y + t * s.y_time + d * s.y_dim, s.y_dim, Vec{},
                  d1 - d < kLanes ? d1 - d : kLanes);
}

// Widths without inner loops of their own: one tap at a time.
template <class X>
void taps_run(const Sequence<X>& s, int64_t d0, int64_t d1, int64_t t0, int64_t t1) {
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
  const bool common = s.width >= kMinWidth && s.width <= kMaxWidth;
  // By kind.
  const auto run = common ? std::array{zero_run<X>, blocks_run<X>, inside_run<X>}
                          : std::array{zero_run<X>, taps_run<X>, taps_run<X>};
  const bool no_edges = s.mask == nullptr && times_fit(s, part.begin, part.end);
  const auto kind = [&](int64_t t) {
    return s.masked(t) ? kMasked : no_edges || s.is_inside(t) ? kInside : kEdge;
  };
  for (int64_t t = part.begin; t < part.end;) {
    const Kind here = kind(t);
    int64_t end = t + 1;
    if (s.mask == nullptr)
      end = here == kInside || part.end < s.past ? part.end : s.past;
    else
      while (end < part.end && kind(end) == here) ++end;
    run[here](s, part.dim_begin, part.dim_end, t, end);
    t = end;
  }
  if (part.end >= s.length) write_states(s, a, part);
}

void dispatch(const CausalConv1d& a, const CausalConv1dPart& part) {
  with_type(a.type, [&](auto x) { convolve<decltype(x)>(a, part); });
}

}  // namespace
}  // namespace effinfer
