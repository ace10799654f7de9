// The definition, one number at a time.
#include "base/scalar.h"

#include "ops/selective_scan_lmu/selective_scan_lmu.h"

namespace effinfer {

void selective_scan_lmu_scalar(const SelectiveScanLmu& a, int64_t begin, int64_t end,
                               float* scratch) {
  float* const m = scratch;  // the memory, then the step's inputs
  float* const next = scratch + a.inner();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / a.dim, channel = row % a.dim;
    const auto save = [&](float* to) {
      for (int64_t n = 0; n < a.state; ++n) to[n] = m[n];
    };
    const auto snapshot = [&](int64_t k) {
      save(a.snapshots + ((batch * a.num_snapshots + k) * a.dim + channel) * a.state);
    };
    for (int64_t n = 0; n < a.state; ++n)
      m[n] = a.initial_state != nullptr ? a.initial_state[row * a.state + n] : 0.f;
    for (int64_t k = a.length; k < a.num_snapshots; ++k) snapshot(k);
    for (int64_t t = 0; t < a.length; t += a.chunk) {
      with_type(a.u.type, [&](auto type) {
        const auto* u = static_cast<const decltype(type)*>(a.u.data) + batch * a.u.batch +
                        channel * a.u.channel;
        for (int64_t i = 0; i < a.chunk; ++i) m[a.state + i] = scalar::get(u + (t + i) * a.u.time);
      });
      for (int64_t n = 0; n < a.state; ++n) {
        const float* column = a.transition + n / kLmuPanel * a.inner() * kLmuPanel + n % kLmuPanel;
        next[n] = 0.f;
        for (int64_t j = 0; j < a.inner(); ++j) next[n] += column[j * kLmuPanel] * m[j];
      }
      for (int64_t n = 0; n < a.state; ++n) m[n] = next[n];
      if (a.memories != nullptr)
        with_type(a.u.type, [&](auto type) {
          auto* to = static_cast<decltype(type)*>(a.memories) + (row * a.length + t) * a.state;
          for (int64_t n = 0; n < a.state; ++n) scalar::put(to + n, m[n]);
        });
      if (const int64_t left = a.length - t - a.chunk; left < a.num_snapshots) snapshot(left);
    }
    save(a.last_state + row * a.state);
  }
}

}  // namespace effinfer
