// From the finished sums to y: bias, activation, gating, residual, and x's type. Included by
// generic.h only.
#pragma once
#include "base/vec.h"
#include "ops/linear/linear.h"

namespace effinfer {
namespace {

using namespace linear_layout;

template <int N>
EFFINFER_INLINE Vec polynomial(Vec x, const float (&c)[N]) {
  Vec q = splat(c[N - 1]);
  EFFINFER_UNROLL
  for (int i = N - 2; i >= 0; --i) q = fma(q, x, splat(c[i]));
  return q;
}

// x Phi(x), error <= 1e-7 |x|. With t = |x| / sqrt(2): erf(t) / t is a polynomial in t^2 below 1,
// log(erfc(t)) one in t above, so the left tail decays as it should.
EFFINFER_INLINE Vec gelu(Vec x) {
  constexpr float kErf[] = {1.1283791065216064f,    -0.3761262595653534f,  0.11283600330352783f,
                            -0.026854444295167923f, 0.005189535208046436f, -0.0008020841050893068f,
                            7.889119297033176e-05f};
  constexpr float kLogErfc[] = {0.000183444150025025f,  -1.1295567750930786f,
                                -0.6332626342773438f,   -0.10837247967720032f,
                                0.02517896704375744f,   -0.004193610977381468f,
                                0.0004391063703224063f, -2.149611282220576e-05f};
  const Vec half = splat(0.5f), s = x * splat(0.70710678f);
  const Vec t = min(abs(s), splat(20.f));
  const Vec near = fma(half * s, polynomial(t * t, kErf), half);
  const Vec tail = half * exp(polynomial(t, kLogErfc));
  const Vec far = select(x < Vec{}, tail, splat(1.f) - tail);
  return x * select(t < splat(1.f), near, far);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u).
EFFINFER_INLINE Vec gelu_tanh(Vec x) {
  const Vec u2 = x * splat(1.5957691216f) * fma(splat(0.044715f) * x, x, splat(1.f));
  return x / (splat(1.f) + exp(-u2));
}

// The n-vector at p, zeros beyond `left` elements.
template <class T>
EFFINFER_INLINE Vec load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : left > 0 ? load_n(p, left) : Vec{};
}

// One panel of outputs for all rows of a task: where its sums lie, what joins them, where y goes.
template <class T>
struct Finish {
  const float *sums, *up_sums;  // [rows, 16]; up_sums for the *_mul epilogues
  const float *bias, *up_bias;  // null for none
  const T* residual;            // or null
  T* y;
  int64_t rows, residual_stride, y_stride;
  int64_t valid;  // outputs of this panel, the others are padding
};

// y = f(sums + bias) [* (up_sums + up_bias)] + residual
template <bool kTwo, class T, class F>
void finish_rows(const Finish<T>& o, F&& f) {
  for (int64_t v = 0; v < o.valid; v += kLanes) {
    const int64_t left = o.valid - v;
    const Vec bias = o.bias != nullptr ? load_up_to(o.bias + v, left) : Vec{};
    const Vec up_bias = kTwo && o.up_bias != nullptr ? load_up_to(o.up_bias + v, left) : Vec{};
    for (int64_t r = 0; r < o.rows; ++r) {
      Vec out = f(load(o.sums + r * kPanel + v) + bias);
      if constexpr (kTwo) out = out * (load(o.up_sums + r * kPanel + v) + up_bias);
      if (o.residual != nullptr) out += load_up_to(o.residual + r * o.residual_stride + v, left);
      T* const y = o.y + r * o.y_stride + v;
      if (left >= kLanes)
        store(y, out);
      else
        store_n(y, out, left);
    }
  }
}

template <class T>
void finish_panel(Epilogue e, const Finish<T>& o) {
  switch (e) {
    case Epilogue::none:
      return finish_rows<false>(o, [](Vec x) { return x; });
    case Epilogue::silu:
      return finish_rows<false>(o, [](Vec x) { return silu(x); });
    case Epilogue::gelu:
      return finish_rows<false>(o, [](Vec x) { return gelu(x); });
    case Epilogue::gelu_tanh:
      return finish_rows<false>(o, [](Vec x) { return gelu_tanh(x); });
    case Epilogue::silu_mul:
      return finish_rows<true>(o, [](Vec x) { return silu(x); });
    case Epilogue::gelu_mul:
      return finish_rows<true>(o, [](Vec x) { return gelu(x); });
  }
}

// How the sums [rows, 16] of a task's panel, or of its gate and the panel after it, become y.
template <class T>
Finish<T> finish_of(const Linear& a, const LinearTask& t, int64_t panel, const float* sums) {
  const int64_t n = (t.panel + panel) / (takes_two(a.epilogue) ? 2 : 1) * kPanel;
  const auto residual = static_cast<const T*>(a.residual);
  Finish<T> o = {};
  o.sums = sums;
  o.up_sums = sums + t.rows * kPanel;
  if (a.bias != nullptr) {
    o.bias = a.bias + n;
    o.up_bias = a.bias + a.n + n;
  }
  if (residual != nullptr) o.residual = residual + t.row * a.residual_stride + n;
  o.y = static_cast<T*>(a.y) + t.row * a.y_stride + n;
  o.rows = t.rows;
  o.residual_stride = a.residual_stride;
  o.y_stride = a.y_stride;
  o.valid = a.n - n < kPanel ? a.n - n : kPanel;
  return o;
}

// Turns the sums [panels, rows, 16] of the task's panels from `panel` on into y.
template <class T>
void finish(const Linear& a, const LinearTask& t, int64_t panel, int64_t panels,
            const float* sums) {
  const int64_t step = takes_two(a.epilogue) ? 2 : 1;
  for (int64_t p = 0; p < panels; p += step, sums += step * t.rows * kPanel)
    finish_panel(a.epilogue, finish_of<T>(a, t, panel + p, sums));
}

}  // namespace
}  // namespace effinfer
