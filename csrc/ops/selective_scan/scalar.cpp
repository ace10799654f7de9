// The definition, one element at a time; the state lives in last_state.
#include "base/scalar.h"

#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

float value(const void* data, DType type, int64_t at) {
  float x = 0;
  with_type(type, [&](auto t) { x = scalar::get(static_cast<const decltype(t)*>(data) + at); });
  return x;
}

float value(const ScanSignal& s, int64_t batch, int64_t channel, int64_t time) {
  return value(s.data, s.type, batch * s.batch + channel * s.channel + time * s.time);
}

float value(const ScanMatrix& m, int64_t dim, int64_t batch, int64_t channel, int64_t n,
            int64_t time) {
  const int64_t group = channel / (dim / m.groups);
  return value(m.data, m.type, batch * m.batch + group * m.group + n * m.state + time * m.time);
}

void set(const ScanSignal& s, int64_t batch, int64_t channel, int64_t time, float x) {
  const int64_t at = batch * s.batch + channel * s.channel + time * s.time;
  with_type(s.type, [&](auto t) { scalar::put(static_cast<decltype(t)*>(s.data) + at, x); });
}

}  // namespace

void selective_scan_scalar(const SelectiveScan& a, const ScanUnit& unit, float*) {
  const int64_t b = unit.batch;
  const auto valid = [&](int64_t t) {
    return a.mask == nullptr || a.mask[b * a.mask_batch + t * a.mask_time] != 0;
  };
  int64_t tokens = 0;
  for (int64_t t = unit.begin; t < unit.end; ++t) tokens += valid(t);

  for (int64_t d = unit.channel; d < unit.channel + unit.channels; ++d) {
    const int64_t row = (unit.sequence * a.dim + d) * a.state;
    float* h = a.last_state + row;
    for (int64_t n = 0; n < a.state; ++n)
      h[n] = a.initial_state != nullptr ? a.initial_state[row + n] : 0.f;
    const auto snapshot = [&](int64_t k) {
      if (k >= a.num_snapshots) return;
      float* to = a.snapshots + ((unit.sequence * a.num_snapshots + k) * a.dim + d) * a.state;
      for (int64_t n = 0; n < a.state; ++n) to[n] = h[n];
    };
    for (int64_t k = a.num_snapshots - 1; k >= tokens; --k) snapshot(k);
    int64_t left = tokens;
    for (int64_t i = unit.begin; i < unit.end; ++i) {
      const int64_t t = a.reverse ? unit.end - 1 - (i - unit.begin) : i;
      if (!valid(t)) {
        set(a.y, b, d, t, 0.f);
        continue;
      }
      float step = value(a.delta, b, d, t) + (a.delta_bias != nullptr ? a.delta_bias[d] : 0.f);
      if (a.softplus) step = scalar::softplus(step);
      const float u = value(a.u, b, d, t);
      float y = a.D != nullptr ? a.D[d] * u : 0.f;
      for (int64_t n = 0; n < a.state; ++n) {
        h[n] =
            std::exp(step * a.A[d * a.state + n]) * h[n] + step * u * value(a.B, a.dim, b, d, n, t);
        y += value(a.C, a.dim, b, d, n, t) * h[n];
      }
      if (a.z.data != nullptr) y *= scalar::silu(value(a.z, b, d, t));
      set(a.y, b, d, t, y);
      snapshot(--left);
    }
  }
}

}  // namespace effinfer
