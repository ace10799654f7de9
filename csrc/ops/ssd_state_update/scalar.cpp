// The definition, one element at a time; the only kernel for states whose N is not dense.
#include "base/scalar.h"

#include "ops/ssd_state_update/ssd_state_update.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

template <class X, class DT, class BC>
void update_head(const SsdStateUpdate& a, int64_t row, int64_t head) {
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const int64_t group = head / (a.heads / a.groups);
  X* y = static_cast<X*>(a.y) + row * a.y_strides[0] + head * a.y_strides[1];
  const X* x = static_cast<const X*>(a.x) + row * a.x_strides[0] + head * a.x_strides[1];
  const BC* B = static_cast<const BC*>(a.B) + row * a.B_strides[0] + group * a.B_strides[1];
  const BC* C = static_cast<const BC*>(a.C) + row * a.C_strides[0] + group * a.C_strides[1];
  for (int64_t p = 0; p < a.head_dim; ++p) {
    if (slot < 0) {
      put(y + p * a.y_strides[2], 0.f);
      continue;
    }
    float delta = get(static_cast<const DT*>(a.dt) + row * a.dt_strides[0] +
                      head * a.dt_strides[1] + p * a.dt_strides[2]);
    if (a.dt_bias != nullptr)
      delta += a.dt_bias[head * a.dt_bias_strides[0] + p * a.dt_bias_strides[1]];
    if (a.dt_softplus) delta = scalar::softplus(delta);
    delta = delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;
    const float value = get(x + p * a.x_strides[2]);
    const float* A = a.A + head * a.A_strides[0] + p * a.A_strides[1];
    float* S =
        a.state + slot * a.state_strides[0] + head * a.state_strides[1] + p * a.state_strides[2];
    double total = 0;
    for (int64_t n = 0; n < a.state_dim; ++n) {
      float& s = S[n * a.state_strides[3]];
      s = std::exp(delta * A[n * a.A_strides[2]]) * s + delta * value * get(B + n * a.B_strides[2]);
      total += double{s} * get(C + n * a.C_strides[2]);
    }
    if (a.D != nullptr) total += double{a.D[head * a.D_strides[0] + p * a.D_strides[1]]} * value;
    float out = static_cast<float>(total);
    if (a.z != nullptr)
      out *= scalar::silu(get(static_cast<const X*>(a.z) + row * a.z_strides[0] +
                              head * a.z_strides[1] + p * a.z_strides[2]));
    put(y + p * a.y_strides[2], out);
  }
}

}  // namespace

void ssd_state_update_scalar(const SsdStateUpdate& a, int64_t row, int64_t head_begin,
                             int64_t head_end) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.dt_type, [&](auto dt) {
      with_type(a.B_type, [&](auto b) {
        for (int64_t head = head_begin; head < head_end; ++head)
          update_head<decltype(x), decltype(dt), decltype(b)>(a, row, head);
      });
    });
  });
}

}  // namespace effinfer
