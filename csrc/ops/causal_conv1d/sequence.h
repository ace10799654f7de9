// One sequence of causal_conv1d as its vector kernels see it.
#pragma once
#include "base/vec.h"
#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/causal_conv1d/lanes.h"

namespace effinfer {
namespace {

// Pointers stand at the sequence's first position.
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
  __attribute__((noinline)) Vec column(int64_t t, int64_t d, int64_t n) const {
    if (t >= 0) return masked(t) ? Vec{} : load_lanes(x + t * x_time + d * x_dim, x_dim, n);
    if (initial == nullptr) return Vec{};
    return load_lanes(initial + (past + t) * initial_column + d * initial_dim, initial_dim, n);
  }
};

}  // namespace
}  // namespace effinfer
