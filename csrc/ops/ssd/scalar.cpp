// The definition, one token at a time.
#include "base/scalar.h"

#include "ops/ssd/tokens.h"

namespace effinfer {
namespace {

using scalar::get;
using scalar::put;

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
    const auto at = [&](const int64_t* strides, int64_t column) {
      return walk.row * strides[0] + t * strides[1] + column * strides[2];
    };
    float delta = get(a.dt, a.dt_type, at(a.dt_strides, head));
    if (a.dt_bias != nullptr) delta += a.dt_bias[head * a.dt_bias_stride];
    if (a.dt_softplus) delta = scalar::softplus(delta);
    delta = delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;
    const float decay = std::exp(delta * a.A[head * a.A_stride]);
    const int64_t x = at(a.x_strides, head), y = at(a.y_strides, head), z = at(a.z_strides, head);
    const int64_t B = at(a.B_strides, group), C = at(a.C_strides, group);
    for (int64_t p = 0; p < P; ++p) {
      const float value = get(a.x, a.x_type, x + p * a.x_strides[3]);
      double total = 0;
      for (int64_t n = 0; n < N; ++n) {
        float& s = S[p * N + n];
        s = decay * s + delta * value * get(a.B, a.B_type, B + n * a.B_strides[3]);
        total += double{s} * get(a.C, a.B_type, C + n * a.C_strides[3]);
      }
      if (a.D != nullptr) total += double{a.D[head * a.D_strides[0] + p * a.D_strides[1]]} * value;
      float out = static_cast<float>(total);
      if (a.z != nullptr) out *= scalar::silu(get(a.z, a.x_type, z + p * a.z_strides[3]));
      put(a.y, a.x_type, y + p * a.y_strides[3], out);
    }
    if (walk.after < a.snapshot_count) copy_state(a, S, snapshot(a, sequence, walk.after, head));
  }
}

}  // namespace

void ssd_scalar(const Ssd& a, int64_t sequence, int64_t head_begin, int64_t head_end, float*) {
  TokenWalk walk(a, sequence);
  zero_masked(a, walk, head_begin, head_end);
  for (int64_t head = head_begin; head < head_end; ++head) scan_head(a, sequence, head, walk);
}

}  // namespace effinfer
