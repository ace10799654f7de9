// The definition, one output at a time.
#include "ops/linear/scalar_epilogue.h"
#include "ops/lowbit_linear/codes.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// One panel's output: its values, and the numbers of its groups.
struct Output {
  const LowbitWeight& w;
  int64_t panel;
  int lane;

  int64_t at(int64_t g) const { return panel * w.scale_stride + g * kPanel + lane; }
  float scale(int64_t g) const { return scalar::get(w.scale, w.scale_type, at(g)); }
  float offset(int64_t g) const { return scalar::get(w.offset, w.scale_type, at(g)); }
  // value - zero
  int value(int64_t k, int64_t g) const {
    const int value = lowbit::value_at(w.format, w.packed + panel * w.panel_stride, k, lane);
    return w.zero == nullptr ? value : value - (w.zero[at(g)] - lowbit::layout(w.format).centre);
  }
  float weight(int64_t k) const {
    const int64_t g = k / w.group;
    const float product = scale(g) * static_cast<float>(value(k, g));
    return w.offset == nullptr ? product : product + offset(g);
  }
};

float int8_dot(const LowbitLinear& a, const LowbitRows& q, int64_t row, const Output& out) {
  const int8_t* const x = q.codes + row * q.stride;
  float t = 0;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t begin = g * a.weight.group, end = begin + a.weight.group;
    int32_t sum = 0;
    for (int64_t k = begin; k < (end < a.io.k ? end : a.io.k); ++k) sum += out.value(k, g) * x[k];
    t = std::fma(out.scale(g), static_cast<float>(sum), t);
    if (a.weight.offset != nullptr)
      t = std::fma(out.offset(g), static_cast<float>(q.sums[row * q.groups + g]), t);
  }
  return q.scale[row] * t;
}

// As linear's: blocks of kTerms products, each from a sum of its own.
template <class X>
float float_dot(const LowbitLinear& a, int64_t row, const Output& out) {
  const X* const x = static_cast<const X*>(a.io.x) + row * a.io.x_stride;
  float total = 0;
  for (int64_t begin = 0; begin < a.io.k; begin += kTerms) {
    const int64_t end = begin + kTerms < a.io.k ? begin + kTerms : a.io.k;
    float sum = 0;
    for (int64_t k = begin; k < end; ++k) sum = std::fma(scalar::get(x + k), out.weight(k), sum);
    total = begin == 0 ? sum : total + sum;
  }
  return total;
}

// From sums to y.
template <class X, class Dot>
void finish(const LowbitLinear& a, const LinearTask& t, Dot&& dot) {
  const auto sum = [&](int64_t row, int64_t panel, int64_t lane) {
    return dot(row, Output{a.weight, panel, static_cast<int>(lane)});
  };
  scalar::finish_each<X>(a.io, t, sum, [&](int64_t row, int64_t n, float v) {
    const int64_t at = row * a.io.y_stride + n;
    if (a.multiplier == nullptr) return scalar::put(static_cast<X*>(a.io.y) + at, v);
    v *= a.multiplier[n];
    v = v >= a.low ? v : a.low;
    static_cast<int8_t*>(a.io.y)[at] =
        static_cast<int8_t>(std::nearbyint(v <= a.high ? v : a.high));
  });
}

// xs, and the codes.
template <class X>
float quantize(const X* x, int64_t k, int8_t* codes) {
  uint32_t largest = 0;  // absmax, in bits: those of NaN are the largest of all
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t magnitude = scalar::float_to_bits(scalar::get(x + i)) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  const float absmax = scalar::bits_to_float(largest);
  const float inverse = 127.f / absmax;
  if (!std::isfinite(absmax)) return absmax - absmax;  // NaN
  if (!std::isfinite(inverse)) return 0;
  for (int64_t i = 0; i < k; ++i)
    codes[i] = static_cast<int8_t>(std::nearbyint(scalar::get(x + i) * inverse));
  return absmax / 127.f;
}

}  // namespace

void lowbit_quantize_scalar(const LowbitLinear& a, const LowbitRows& q, int64_t row, int64_t rows) {
  const int64_t k = a.io.k;
  for (int64_t r = row; r < row + rows; ++r) {
    int8_t* const codes = q.codes + r * q.stride;
    std::memset(codes, 0, static_cast<size_t>(q.stride));
    if (a.x_scale != nullptr) {
      const int8_t* const x = static_cast<const int8_t*>(a.io.x) + r * a.io.x_stride;
      std::memcpy(codes, x, static_cast<size_t>(k));
      q.scale[r] = a.x_scale[r];
    } else {
      with_type(a.io.x_type, [&](auto x) {
        q.scale[r] =
            quantize(static_cast<const decltype(x)*>(a.io.x) + r * a.io.x_stride, k, codes);
      });
    }
    for (int64_t g = 0; g < q.groups; ++g) {
      const int64_t begin = g * a.weight.group, end = begin + a.weight.group;
      int32_t sum = 0;
      for (int64_t i = begin; i < (end < k ? end : k); ++i) sum += codes[i];
      q.sums[r * q.groups + g] = sum;
    }
  }
}

void lowbit_int8_scalar(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  with_type(a.io.x_type, [&](auto x) {
    finish<decltype(x)>(a, t,
                        [&](int64_t row, const Output& out) { return int8_dot(a, q, row, out); });
  });
}

void lowbit_float_scalar(const LowbitLinear& a, const LinearTask& t) {
  with_type(a.io.x_type, [&](auto x) {
    using X = decltype(x);
    finish<X>(a, t, [&](int64_t row, const Output& out) { return float_dot<X>(a, row, out); });
  });
}

}  // namespace effinfer
