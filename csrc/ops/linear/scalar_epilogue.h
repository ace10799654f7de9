// From a sum of products to an output, one at a time: the definition. Included by scalar files
// only.
#pragma once
#include "base/scalar.h"
#include "ops/linear/linear.h"

namespace effinfer::scalar {

inline float gelu(float x) { return 0.5f * x * (1.f + std::erf(x * 0.70710678f)); }
inline float gelu_tanh(float x) {
  return x / (1.f + std::exp(-1.5957691216f * x * (1.f + 0.044715f * x * x)));
}

inline float activate(Epilogue e, float x) {
  switch (e) {
    case Epilogue::none:
      return x;
    case Epilogue::silu:
    case Epilogue::silu_mul:
      return silu(x);
    case Epilogue::gelu:
    case Epilogue::gelu_mul:
      return gelu(x);
    case Epilogue::gelu_tanh:
      return gelu_tanh(x);
  }
  return x;
}

// put(row, n, f(dot + bias) [* (dot of the next panel + its bias)] + residual) for every output of
// a task; dot(row, panel, lane) is asked once for each sum.
template <class X, class Dot, class Put>
void finish_each(const Linear& a, const LinearTask& t, Dot&& dot, Put&& put) {
  using linear_layout::kPanel;
  const int64_t step = takes_two(a.epilogue) ? 2 : 1;
  for (int64_t row = t.row; row < t.row + t.rows; ++row) {
    const X* residual = static_cast<const X*>(a.residual) + row * a.residual_stride;
    for (int64_t panel = t.panel; panel < t.panel + t.panels; panel += step) {
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t n = panel / step * kPanel + lane;
        if (n >= a.n) break;
        float v = dot(row, panel, lane) + (a.bias != nullptr ? a.bias[n] : 0.f);
        v = activate(a.epilogue, v);
        if (step == 2) v *= dot(row, panel + 1, lane) + (a.bias != nullptr ? a.bias[a.n + n] : 0.f);
        put(row, n, a.residual != nullptr ? v + get(residual + n) : v);
      }
    }
  }
}

}  // namespace effinfer::scalar
