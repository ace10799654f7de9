// ssd_state_update over vec.h: rows of the state in blocks of kLanes, N along the lanes.
#include "ops/scan/rows.h"
#include "ops/ssd/step.h"
#include "ops/ssd_state_update/ssd_state_update.h"

namespace effinfer {
namespace {

template <class X, class BC>
struct HeadUpdate {
  const SsdStateUpdate& a;
  int64_t row, head;

  const float* per_head(const float* t, const int64_t* strides) const {
    return t + head * strides[0];
  }

  Vec steps(int64_t p, int64_t n) const {
    const auto at = row * a.dt_strides[0] + head * a.dt_strides[1] + p * a.dt_strides[2];
    float values[kLanes];
    load_row(values, a.dt, a.dt_type, at, a.dt_strides[2], n);
    Vec d = load(values);
    if (a.dt_bias != nullptr)
      d = d + load_strided(per_head(a.dt_bias, a.dt_bias_strides) + p * a.dt_bias_strides[1],
                           a.dt_bias_strides[1], n);
    if (a.dt_softplus) d = softplus(d);
    return min(splat(a.dt_max), max(splat(a.dt_min), d));  // NaN stays: the second operand
  }

  template <Decay kDecay>
  void run(float* state) const {
    const int64_t group = head / (a.heads / a.groups), P = a.head_dim;
    const X* const x = static_cast<const X*>(a.x) + row * a.x_strides[0] + head * a.x_strides[1];
    X* const y = static_cast<X*>(a.y) + row * a.y_strides[0] + head * a.y_strides[1];
    const float* const A = per_head(a.A, a.A_strides);
    StepArgs<BC> s = {state,
                      state,
                      a.state_strides[2],
                      a.state_strides[2],
                      a.state_dim,
                      static_cast<const BC*>(a.B) + row * a.B_strides[0] + group * a.B_strides[1],
                      static_cast<const BC*>(a.C) + row * a.C_strides[0] + group * a.C_strides[1],
                      A,
                      a.A_strides[1]};
    Vec step{}, decay{};
    if constexpr (kDecay == Decay::kHead) {
      step = splat(steps(0, 1)[0]);
      decay = exp(step * splat(A[0]));
    }
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t n = least(kLanes, P - p);
      if constexpr (kDecay != Decay::kHead) step = decay = steps(p, n);
      if constexpr (kDecay == Decay::kRow)
        decay = exp(step * load_strided(A + p * a.A_strides[1], a.A_strides[1], n));
      const Vec value = load_strided(x + p * a.x_strides[2], a.x_strides[2], n);
      Vec out = step_rows<kDecay>(s, n, decay, step * value);
      if (a.D != nullptr)
        out = fma(load_strided(per_head(a.D, a.D_strides) + p * a.D_strides[1], a.D_strides[1], n),
                  value, out);
      if (a.z != nullptr)
        out = out * silu(load_strided(static_cast<const X*>(a.z) + row * a.z_strides[0] +
                                          head * a.z_strides[1] + p * a.z_strides[2],
                                      a.z_strides[2], n));
      store_strided(y + p * a.y_strides[2], a.y_strides[2], out, n);
      s.from = s.to += kLanes * s.to_stride;
      s.A += kLanes * s.A_stride;
    }
  }

  void skip() const {
    X* const y = static_cast<X*>(a.y) + row * a.y_strides[0] + head * a.y_strides[1];
    for (int64_t p = 0; p < a.head_dim; ++p) y[p * a.y_strides[2]] = X{};
  }
};

void dispatch(const SsdStateUpdate& a, int64_t row, int64_t head_begin, int64_t head_end) {
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const bool one_step = a.dt_strides[2] == 0 && (a.dt_bias == nullptr || a.dt_bias_strides[1] == 0);
  const bool one_rate = a.A_strides[2] == 0;
  with_type(a.x_type, [&](auto x) {
    with_type(a.B_type, [&](auto b) {
      for (int64_t head = head_begin; head < head_end; ++head) {
        const HeadUpdate<decltype(x), decltype(b)> update = {a, row, head};
        float* const state = a.state + slot * a.state_strides[0] + head * a.state_strides[1];
        if (slot < 0)
          update.skip();
        else if (!one_rate)
          update.template run<Decay::kElement>(state);
        else if (one_step && a.A_strides[1] == 0)
          update.template run<Decay::kHead>(state);
        else
          update.template run<Decay::kRow>(state);
      }
    });
  });
}

}  // namespace
}  // namespace effinfer
