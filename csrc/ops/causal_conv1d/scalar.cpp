// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/causal_conv1d/causal_conv1d.h"

namespace effinfer {
namespace {

// One sequence as the formula sees it: [initial_state | x], masked positions zero.
template <class X>
struct History {
  const CausalConv1d& a;
  int64_t sequence, batch, begin, length, past;

  bool masked(int64_t t) const {
    return a.mask != nullptr && a.mask[batch * a.mask_batch + (begin + t) * a.mask_time] == 0;
  }
  int64_t offset(int64_t d, int64_t t, int64_t batch_stride, int64_t dim_stride,
                 int64_t time_stride) const {
    return batch * batch_stride + d * dim_stride + (begin + t) * time_stride;
  }
  float at(int64_t d, int64_t t) const {  // t >= -past
    if (t >= 0)
      return masked(t) ? 0.f
                       : scalar::get(static_cast<const X*>(a.x) +
                                     offset(d, t, a.x_batch, a.x_dim, a.x_time));
    if (a.initial_state == nullptr) return 0.f;
    return a.initial_state[sequence * a.initial_sequence + d * a.initial_dim +
                           (past + t) * a.initial_column];
  }
};

template <class X>
void convolve(const CausalConv1d& a, const CausalConv1dPart& part) {
  const int64_t begin = a.cu_seqlens != nullptr ? a.cu_seqlens[part.sequence] : 0;
  const int64_t end = a.cu_seqlens != nullptr ? a.cu_seqlens[part.sequence + 1] : a.length;
  const History<X> h = {
      .a = a,
      .sequence = part.sequence,
      .batch = a.cu_seqlens != nullptr ? 0 : part.sequence,
      .begin = begin,
      .length = end - begin,
      .past = (a.width - 1) * a.dilation,
  };
  const auto y = static_cast<X*>(a.y);
  for (int64_t d = part.dim_begin; d < part.dim_end; ++d) {
    for (int64_t t = part.begin; t < part.end; ++t) {
      float sum = a.bias != nullptr ? a.bias[d] : 0.f;
      for (int64_t j = 0; j < a.width; ++j)
        sum += a.weight[d * a.width + j] * h.at(d, t - (a.width - 1 - j) * a.dilation);
      const float value = h.masked(t) ? 0.f : a.silu ? scalar::silu(sum) : sum;
      scalar::put(y + h.offset(d, t, a.y_batch, a.y_dim, a.y_time), value);
    }
    if (part.end < h.length) continue;
    for (int64_t k = 0; k < a.num_states; ++k) {
      float* state = a.states + ((part.sequence * a.num_states + k) * a.dim + d) * h.past;
      const int64_t tokens = h.length > k ? h.length - k : 0;
      for (int64_t c = 0; c < h.past; ++c) state[c] = h.at(d, tokens - h.past + c);
    }
  }
}

}  // namespace

void causal_conv1d_scalar(const CausalConv1d& a, const CausalConv1dPart& part) {
  with_type(a.type, [&](auto x) { convolve<decltype(x)>(a, part); });
}

}  // namespace effinfer
