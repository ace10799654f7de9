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

template <class F>
EFFINFER_INLINE void map_row(float* sums, int64_t columns, F&& f) {
  for (int64_t i = 0; i < columns; i += kLanes) store(sums + i, f(load(sums + i)));
}

// gate panel, up panel, gate panel, ... -> act(gate) * up, packed to the front.
template <class F>
EFFINFER_INLINE void gate_row(float* sums, int64_t columns, F&& f) {
  for (int64_t i = 0; i < columns; i += kPanel) {
    EFFINFER_UNROLL
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      const float* pair = sums + 2 * i + v;
      store(sums + i + v, f(load(pair)) * load(pair + kPanel));
    }
  }
}

void add_bias(float* sums, const float* bias, int64_t columns, int64_t valid, int64_t step) {
  for (int64_t i = 0; i < columns; i += kPanel) {
    EFFINFER_UNROLL
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      float* p = sums + i * step + v;
      store(p, load(p) + load_up_to(bias + i + v, valid - i - v));
    }
  }
}

void activate_row(Epilogue e, float* sums, int64_t columns) {
  switch (e) {
    case Epilogue::none:
      return;
    case Epilogue::silu:
      return map_row(sums, columns, [](Vec x) { return silu(x); });
    case Epilogue::gelu:
      return map_row(sums, columns, [](Vec x) { return gelu(x); });
    case Epilogue::gelu_tanh:
      return map_row(sums, columns, [](Vec x) { return gelu_tanh(x); });
    case Epilogue::silu_mul:
      return gate_row(sums, columns, [](Vec x) { return silu(x); });
    case Epilogue::gelu_mul:
      return gate_row(sums, columns, [](Vec x) { return gelu(x); });
  }
}

template <class T>
void store_row(const float* sums, const T* residual, T* y, int64_t valid) {
  for (int64_t i = 0; i < valid; i += kLanes) {
    const int64_t left = valid - i;
    Vec v = load(sums + i);
    if (residual != nullptr) v += load_up_to(residual + i, left);
    if (left >= kLanes)
      store(y + i, v);
    else
      store_n(y + i, v, left);
  }
}

// Turns the task's sums [rows, panels * 16] into y.
template <class T>
void finish(const Linear& a, const LinearTask& t, float* sums) {
  const int64_t step = takes_two(a.epilogue) ? 2 : 1;
  const int64_t begin = t.panel / step * kPanel, columns = t.panels / step * kPanel;
  const int64_t valid = a.n - begin < columns ? a.n - begin : columns;
  const auto residual = static_cast<const T*>(a.residual);
  for (int64_t r = 0; r < t.rows; ++r, sums += t.panels * kPanel) {
    const int64_t row = t.row + r;
    if (a.bias != nullptr) {
      add_bias(sums, a.bias + begin, columns, valid, step);
      if (step == 2) add_bias(sums + kPanel, a.bias + a.n + begin, columns, valid, step);
    }
    activate_row(a.epilogue, sums, columns);
    store_row(sums, residual != nullptr ? residual + row * a.residual_stride + begin : nullptr,
              static_cast<T*>(a.y) + row * a.y_stride + begin, valid);
  }
}

}  // namespace
}  // namespace effinfer
