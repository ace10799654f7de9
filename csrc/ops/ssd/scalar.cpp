// The definition, one token at a time.
#include "base/scalar.h"

#include "ops/ssd/tokens.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

template <class X, class DT, class BC>
void scan_head(const Ssd& a, int64_t sequence, int64_t head, TokenWalk& walk) {
  const int64_t P = a.head_dim, N = a.state_dim, group = head / (a.heads / a.groups);
  float* const S = last_state(a, sequence, head);
  const float* start = initial_state(a, sequence, head);
  copy_state(a, start, S);
  snapshot_start(a, sequence, head, 0, start);
  walk.rewind();
  for (int64_t t; walk.next(1, &t) > 0;) {
    if (walk.restart && !walk.first) {
      copy_state(a, nullptr, S);
      snapshot_start(a, sequence, head, 0, nullptr);
    }
    float delta = get(static_cast<const DT*>(a.dt) + walk.row * a.dt_strides[0] +
                      t * a.dt_strides[1] + head * a.dt_strides[2]);
    if (a.dt_bias != nullptr) delta += a.dt_bias[head * a.dt_bias_stride];
    if (a.dt_softplus) delta = scalar::softplus(delta);
    delta = delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;
    const float decay = std::exp(delta * a.A[head * a.A_stride]);
    const auto row = [&](const int64_t* strides, int64_t column) {
      return walk.row * strides[0] + t * strides[1] + column * strides[2];
    };
    const X* x = static_cast<const X*>(a.x) + row(a.x_strides, head);
    const BC* B = static_cast<const BC*>(a.B) + row(a.B_strides, group);
    const BC* C = static_cast<const BC*>(a.C) + row(a.C_strides, group);
    X* y = static_cast<X*>(a.y) + row(a.y_strides, head);
    for (int64_t p = 0; p < P; ++p) {
      const float value = get(x + p * a.x_strides[3]);
      double total = 0;
      for (int64_t n = 0; n < N; ++n) {
        float& s = S[p * N + n];
        s = decay * s + delta * value * get(B + n * a.B_strides[3]);
        total += double{s} * get(C + n * a.C_strides[3]);
      }
      if (a.D != nullptr) total += double{a.D[head * a.D_strides[0] + p * a.D_strides[1]]} * value;
      float out = static_cast<float>(total);
      if (a.z != nullptr)
        out *= scalar::silu(
            get(static_cast<const X*>(a.z) + row(a.z_strides, head) + p * a.z_strides[3]));
      put(y + p * a.y_strides[3], out);
    }
    if (walk.after < a.snapshot_count) copy_state(a, S, snapshot(a, sequence, walk.after, head));
  }
}

}  // namespace

void ssd_scalar(const Ssd& a, int64_t sequence, int64_t head_begin, int64_t head_end, float*) {
  TokenWalk walk(a, sequence);
  with_type(a.x_type, [&](auto x) {
    using X = decltype(x);
    zero_masked<X>(a, walk, head_begin, head_end);
    with_type(a.dt_type, [&](auto dt) {
      with_type(a.B_type, [&](auto b) {
        for (int64_t head = head_begin; head < head_end; ++head)
          scan_head<X, decltype(dt), decltype(b)>(a, sequence, head, walk);
      });
    });
  });
}

}  // namespace effinfer
