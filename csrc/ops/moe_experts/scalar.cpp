// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/linear/scalar_epilogue.h"
#include "ops/moe_experts/moe_experts.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

template <class X>
void gather(const MoeExperts& a, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const X* x = static_cast<const X*>(a.x) + a.scratch.pair[at] / a.top_k * a.x_stride;
    for (int64_t i = 0; i < a.dim; ++i) a.scratch.rows[at * a.dim + i] = get(x + i);
  }
}

float activated(ExpertActivation activation, float x) {
  switch (activation) {
    case ExpertActivation::silu:
      return scalar::silu(x);
    case ExpertActivation::gelu:
      return scalar::gelu(x);
    case ExpertActivation::gelu_tanh:
      return scalar::gelu_tanh(x);
    case ExpertActivation::relu2:
      return x < 0.f ? 0.f : x * x;  // NaN stays NaN
  }
  return x;
}

void activate(const MoeExperts& a, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    float* row = a.scratch.inner + at * a.up_outputs();
    for (int64_t i = 0; i < a.inner; ++i) {
      const float x = activated(a.activation, row[i]);
      row[i] = a.gated ? x * row[a.inner + i] : x;
    }
  }
}

template <class X>
void combine(const MoeExperts& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    for (int64_t i = 0; i < a.dim; ++i) {
      double sum = 0;
      for (int64_t pair = row * a.top_k; pair < (row + 1) * a.top_k; ++pair)
        sum += double{a.weights[pair]} * a.scratch.rows[a.scratch.place[pair] * a.dim + i];
      put(y + i, static_cast<float>(sum));
    }
  }
}

}  // namespace

void moe_experts_scalar(const MoeExperts& a, MoePart part, int64_t begin, int64_t end) {
  if (part == MoePart::activate) return activate(a, begin, end);
  with_type(a.x_type, [&](auto x) {
    using X = decltype(x);
    part == MoePart::gather ? gather<X>(a, begin, end) : combine<X>(a, begin, end);
  });
}

}  // namespace effinfer
