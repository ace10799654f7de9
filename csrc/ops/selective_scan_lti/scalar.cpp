// The definition, one element at a time; the state lives in last_state.
#include "base/scalar.h"

#include <complex>

#include "ops/selective_scan_lti/selective_scan_lti.h"

namespace effinfer {
namespace {

// T is float or std::complex<float>, which lies in memory as two floats.
template <class T>
void scan_channel(const SelectiveScanLti& a, const ScanUnit& unit, int64_t d, int64_t tokens) {
  const auto* A = reinterpret_cast<const T*>(a.A) + d * a.state;
  const auto* B = reinterpret_cast<const T*>(a.B) + d * a.state;
  const auto* C = reinterpret_cast<const T*>(a.C) + d * a.state;
  const auto* initial = reinterpret_cast<const T*>(a.initial_state);
  const int64_t row = (unit.sequence * a.dim + d) * a.state;
  T* h = reinterpret_cast<T*>(a.last_state) + row;
  for (int64_t n = 0; n < a.state; ++n) h[n] = initial != nullptr ? initial[row + n] : T{};
  const auto snapshot = [&](int64_t k) {
    if (k >= a.num_snapshots) return;
    T* to = reinterpret_cast<T*>(a.snapshots) +
            ((unit.sequence * a.num_snapshots + k) * a.dim + d) * a.state;
    for (int64_t n = 0; n < a.state; ++n) to[n] = h[n];
  };
  for (int64_t k = a.num_snapshots - 1; k >= tokens; --k) snapshot(k);
  int64_t left = tokens;
  for (int64_t i = unit.begin; i < unit.end; ++i) {
    const int64_t t = a.reverse ? unit.end - 1 - (i - unit.begin) : i;
    const auto at = [&](const ScanSignal& s) {
      return unit.batch * s.batch + d * s.channel + t * s.time;
    };
    const bool valid =
        a.mask == nullptr || a.mask[unit.batch * a.mask_batch + t * a.mask_time] != 0;
    float y = 0.f;
    if (valid) {
      float u = 0.f;
      with_type(a.u.type, [&](auto type) {
        u = scalar::get(static_cast<const decltype(type)*>(a.u.data) + at(a.u));
      });
      if (a.D != nullptr) y = a.D[d] * u;
      for (int64_t n = 0; n < a.state; ++n) {
        h[n] = A[n] * h[n] + B[n] * u;
        y += std::real(C[n] * h[n]);
      }
      snapshot(--left);
    }
    with_type(a.y.type,
              [&](auto type) { scalar::put(static_cast<decltype(type)*>(a.y.data) + at(a.y), y); });
  }
}

}  // namespace

void selective_scan_lti_scalar(const SelectiveScanLti& a, const ScanUnit& unit, float*) {
  int64_t tokens = 0;
  for (int64_t t = unit.begin; t < unit.end; ++t)
    tokens += a.mask == nullptr || a.mask[unit.batch * a.mask_batch + t * a.mask_time] != 0;
  for (int64_t d = unit.channel; d < unit.channel + unit.channels; ++d) {
    if (a.complex)
      scan_channel<std::complex<float>>(a, unit, d, tokens);
    else
      scan_channel<float>(a, unit, d, tokens);
  }
}

}  // namespace effinfer
