// moe_experts over vec.h: everything but the products.
#include "base/vec.h"
#include "ops/linear/epilogue.h"
#include "ops/moe_experts/moe_experts.h"

namespace effinfer {
namespace {

// f(i, n) for vectors [i, i + n) of `count` elements, n less than kLanes in the last only.
template <class F>
EFFINFER_INLINE void each_vector(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, int64_t{kLanes});
  if (i < count) f(i, count - i);
}

template <class T>
EFFINFER_INLINE Vec take(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_n(p, n);
}

template <class T>
EFFINFER_INLINE void put(T* p, Vec x, int64_t n) {
  if (n == kLanes)
    store(p, x);
  else
    store_n(p, x, n);
}

template <class X>
void gather(const MoeExperts& a, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const X* x = static_cast<const X*>(a.x) + a.scratch.pair[at] / a.top_k * a.x_stride;
    float* out = a.scratch.rows + at * a.dim;
    each_vector(a.dim, [&](int64_t i, int64_t n) { put(out + i, take(x + i, n), n); });
  }
}

template <class F>
EFFINFER_INLINE void activate_rows(const MoeExperts& a, int64_t begin, int64_t end, F&& f) {
  const int64_t stride = a.up_outputs();
  for (int64_t at = begin; at < end; ++at) {
    float* row = a.scratch.inner + at * stride;
    const float* up = row + a.inner;
    each_vector(a.inner, [&](int64_t i, int64_t n) {
      const Vec x = f(take(row + i, n));
      put(row + i, a.gated ? x * take(up + i, n) : x, n);
    });
  }
}

void activate(const MoeExperts& a, int64_t begin, int64_t end) {
  switch (a.activation) {
    case ExpertActivation::silu:
      return activate_rows(a, begin, end, [](Vec x) { return silu(x); });
    case ExpertActivation::gelu:
      return activate_rows(a, begin, end, [](Vec x) { return gelu(x); });
    case ExpertActivation::gelu_tanh:
      return activate_rows(a, begin, end, [](Vec x) { return gelu_tanh(x); });
    case ExpertActivation::relu2:
      return activate_rows(a, begin, end, [](Vec x) {
        const Vec positive = max(Vec{}, x);  // in this order NaN stays NaN
        return positive * positive;
      });
  }
}

template <class X>
void combine(const MoeExperts& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* place = a.scratch.place + row * a.top_k;
    const float* weights = a.weights + row * a.top_k;
    X* y = static_cast<X*>(a.y) + row * a.y_stride;
    each_vector(a.dim, [&](int64_t i, int64_t n) {
      Vec sum = {};
      for (int64_t r = 0; r < a.top_k; ++r)
        sum = fma(splat(weights[r]), take(a.scratch.rows + place[r] * a.dim + i, n), sum);
      put(y + i, sum, n);
    });
  }
}

void dispatch(const MoeExperts& a, MoePart part, int64_t begin, int64_t end) {
  if (part == MoePart::activate) return activate(a, begin, end);
  with_type(a.x_type, [&](auto x) {
    using X = decltype(x);
    part == MoePart::gather ? gather<X>(a, begin, end) : combine<X>(a, begin, end);
  });
}

}  // namespace
}  // namespace effinfer
