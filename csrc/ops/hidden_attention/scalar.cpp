// The definition: column j is what a 1 at position j leaves in the outputs.
#include "base/scalar.h"

#include "ops/hidden_attention/hidden_attention.h"

namespace effinfer {
namespace {

float value(const void* data, DType type, int64_t at) {
  float x = 0;
  with_type(type, [&](auto t) { x = scalar::get(static_cast<const decltype(t)*>(data) + at); });
  return x;
}

}  // namespace

void hidden_attention_scalar(const HiddenAttention& a, int64_t row, float* h) {
  const int64_t batch = row / a.dim, channel = row % a.dim;
  const float* A = a.A + channel * a.state;
  float* alpha = a.alpha + row * a.length * a.length;
  const auto step = [&](int64_t t) {
    const ScanSignal& s = a.delta;
    const float x = value(s.data, s.type, batch * s.batch + channel * s.channel + t * s.time) +
                    (a.delta_bias != nullptr ? a.delta_bias[channel] : 0.f);
    return a.softplus ? scalar::softplus(x) : x;
  };
  const auto element = [&](const ScanMatrix& m, int64_t n, int64_t t) {
    const int64_t group = channel / (a.dim / m.groups);
    return value(m.data, m.type, batch * m.batch + group * m.group + n * m.state + t * m.time);
  };
  for (int64_t j = 0; j < a.length; ++j) {
    for (int64_t n = 0; n < a.state; ++n) h[n] = step(j) * element(a.B, n, j);
    for (int64_t i = 0; i < a.length; ++i) {
      float sum = 0.f;
      for (int64_t n = 0; i >= j && n < a.state; ++n) {
        if (i > j) h[n] *= std::exp(step(i) * A[n]);
        sum += element(a.C, n, i) * h[n];
      }
      alpha[i * a.length + j] = sum;
    }
  }
}

}  // namespace effinfer
