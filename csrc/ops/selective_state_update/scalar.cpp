// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/selective_state_update/selective_state_update.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

float value(const StepSignal& s, int64_t row, int64_t channel) {
  return get(s.data, s.type, row * s.batch + channel * s.channel);
}

}  // namespace

void selective_state_update_scalar(const SelectiveStateUpdate& a, int64_t row, int64_t begin,
                                   int64_t end) {
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  for (int64_t d = begin; d < end; ++d) {
    float y = 0;
    if (slot >= 0) {
      const int64_t group = d / (a.dim / a.groups);
      float step = value(a.dt, row, d) + (a.dt_bias != nullptr ? a.dt_bias[d] : 0.f);
      if (a.softplus) step = scalar::softplus(step);
      const float x = value(a.x, row, d);
      y = a.D != nullptr ? a.D[d] * x : 0.f;
      for (int64_t n = 0; n < a.state_size; ++n) {
        float& h = a.state[slot * a.state_slot + d * a.state_channel + n * a.state_n];
        const float b =
            get(a.B.data, a.B.type, row * a.B.batch + group * a.B.group + n * a.B.state);
        const float c =
            get(a.C.data, a.C.type, row * a.C.batch + group * a.C.group + n * a.C.state);
        h = std::exp(step * a.A[d * a.state_size + n]) * h + step * x * b;
        y += c * h;
      }
      if (a.z.data != nullptr) y *= scalar::silu(value(a.z, row, d));
    }
    put(a.y.data, a.y.type, row * a.y.batch + d * a.y.channel, y);
  }
}

}  // namespace effinfer
