// The definition, one element at a time.
#include "base/scalar.h"

#include <algorithm>

#include "ops/binary_linear/bits.h"
#include "ops/linear/scalar_epilogue.h"

namespace effinfer {
namespace {

using namespace binary_layout;

// Bits of one row where less(i); returns them byte by byte.
template <class Less>
void write_bits(uint8_t* bits, int64_t k, Less&& less) {
  for (int64_t i = 0; i < k; i += 8) {
    unsigned byte = 0;
    for (int64_t b = 0; b < 8 && i + b < k; ++b) byte |= less(i + b) ? 1u << b : 0u;
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

template <class T>
float mean_magnitude(const T* x, int64_t k) {
  float sums[16] = {};
  for (int64_t i = 0; i < k; ++i) sums[i % 16] += std::fabs(scalar::get(x + i));
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0] / static_cast<float>(k);
}

template <class T>
void float_signs(const SignRows& a) {
  const auto* threshold = static_cast<const float*>(a.threshold);
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    write_bits(a.bits + r * a.bits_stride, a.k, [&](int64_t i) {
      return scalar::get(x + i) < (threshold != nullptr ? threshold[i] : 0.f);
    });
    if (a.mean != nullptr) a.mean[r] = mean_magnitude(x, a.k);
  }
}

void integer_signs(const SignRows& a) {
  const auto* threshold = static_cast<const int32_t*>(a.threshold);
  for (int64_t r = 0; r < a.rows; ++r) {
    const auto* x = static_cast<const int32_t*>(a.x) + r * a.x_stride;
    write_bits(a.bits + r * a.bits_stride, a.k,
               [&](int64_t i) { return x[i] < (threshold != nullptr ? threshold[i] : 0); });
  }
}

}  // namespace

void binary_signs_scalar(const SignRows& a) {
  if (a.integers) return integer_signs(a);
  with_type(a.type, [&](auto x) { float_signs<decltype(x)>(a); });
}

void binary_count_scalar(const CountTask& t) {
  for (int64_t part = 0; part < 2 * t.panels; ++part) {
    const uint8_t* w = t.weight + part / 2 * t.panel_stride + part % 2 * kPart;
    for (int64_t r = 0; r < t.rows; ++r) {
      int32_t* counts = t.counts + (part * t.rows + r) * kPart;
      std::fill_n(counts, kPart, 0);
      for (int64_t i = 0; i < t.bytes; ++i)
        for (int64_t j = 0; j < kPart; ++j)
          counts[j] += __builtin_popcount(t.x[r * t.x_stride + i] ^ w[i * kOutputs + j]);
    }
  }
}

void binary_finish_scalar(const FinishTask& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t n = 0; n < t.outputs; ++n) {
      const int32_t count = t.counts[(n / kPart * t.rows + r) * kPart + n % kPart];
      const auto dot = static_cast<float>(t.terms[r * t.terms_stride] - 2 * count);
      const float scale = t.weight_scale != nullptr ? t.weight_scale[n] : 1.f;
      const float bias = t.bias != nullptr ? t.bias[n] : 0.f;
      const float v = t.x_scale != nullptr ? std::fma(dot * scale, t.x_scale[r], bias)
                                           : std::fma(dot, scale, bias);
      const float y = scalar::activate(t.epilogue, v);
      scalar::put(t.y, t.type, r * t.y_stride + n,
                  t.residual == nullptr
                      ? y
                      : y + scalar::get(t.residual, t.type, r * t.residual_stride + n));
    }
  }
}

}  // namespace effinfer
