// The definition, one element at a time; the only kernel for states whose N is not dense.
#include "base/scalar.h"

#include "ops/ssd_state_update/ssd_state_update.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

void update_head(const SsdStateUpdate& a, int64_t row, int64_t head) {
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const int64_t group = head / (a.heads / a.groups);
  const auto at = [&](const int64_t* strides, int64_t p) {
    return row * strides[0] + head * strides[1] + p * strides[2];
  };
  const auto of_group = [&](const void* data, const int64_t* strides, int64_t n) {
    return get(data, a.B_type, row * strides[0] + group * strides[1] + n * strides[2]);
  };
  for (int64_t p = 0; p < a.head_dim; ++p) {
    if (slot < 0) {
      put(a.y, a.x_type, at(a.y_strides, p), 0.f);
      continue;
    }
    float delta = get(a.dt, a.dt_type, at(a.dt_strides, p));
    if (a.dt_bias != nullptr)
      delta += a.dt_bias[head * a.dt_bias_strides[0] + p * a.dt_bias_strides[1]];
    if (a.dt_softplus) delta = scalar::softplus(delta);
    delta = delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;
    const float value = get(a.x, a.x_type, at(a.x_strides, p));
    const float* A = a.A + head * a.A_strides[0] + p * a.A_strides[1];
    float* S =
        a.state + slot * a.state_strides[0] + head * a.state_strides[1] + p * a.state_strides[2];
    double total = 0;
    for (int64_t n = 0; n < a.state_dim; ++n) {
      float& s = S[n * a.state_strides[3]];
      s = std::exp(delta * A[n * a.A_strides[2]]) * s +
          delta * value * of_group(a.B, a.B_strides, n);
      total += double{s} * of_group(a.C, a.C_strides, n);
    }
    if (a.D != nullptr) total += double{a.D[head * a.D_strides[0] + p * a.D_strides[1]]} * value;
    float out = static_cast<float>(total);
    if (a.z != nullptr) out *= scalar::silu(get(a.z, a.x_type, at(a.z_strides, p)));
    put(a.y, a.x_type, at(a.y_strides, p), out);
  }
}

}  // namespace

void ssd_state_update_scalar(const SsdStateUpdate& a, int64_t row, int64_t head_begin,
                             int64_t head_end) {
  for (int64_t head = head_begin; head < head_end; ++head) update_head(a, row, head);
}

}  // namespace effinfer
