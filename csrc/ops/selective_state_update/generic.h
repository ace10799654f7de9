// selective_state_update over vec.h: states in the lanes, kPart of them at a time.
#include "ops/scan/rows.h"
#include "ops/selective_state_update/selective_state_update.h"

namespace effinfer {
namespace {

constexpr int64_t kPart = 256;  // states whose B and C are kept on the stack

// Advances n <= kPart states of one channel; gives kLanes partial sums of C h.
EFFINFER_INLINE Vec advance(float* h, int64_t stride, const float* A, const float* B,
                            const float* C, int64_t n, Vec step, Vec input) {
  const auto next = [&](Vec before, Vec a, int64_t i) {
    return fma(exp2(step * a), before, input * load(B + i));
  };
  Vec y{};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      const Vec now = next(load(h + i), load(A + i), i);
      store(h + i, now);
      y = fma(now, load(C + i), y);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t rest = least(kLanes, n - i);
    float now[kLanes];
    store(now, next(load_strided(h + i * stride, stride, rest), load_n(A + i, rest), i));
    store_strided(h + i * stride, stride, load(now), rest);
    y = fma(load_n(now, rest), load(C + i), y);  // an infinite input is nan in the lanes past n
  }
  return y;
}

void update(const SelectiveStateUpdate& args, int64_t row, int64_t begin, int64_t end) {
  const SelectiveStateUpdate a = args;
  const int64_t count = end - begin;
  alignas(64) float x[kStepUnit], step[kStepUnit], y[kStepUnit], z[kStepUnit], B[kPart], C[kPart];
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  const auto signal = [&](float* to, const StepSignal& s) {
    load_row(to, s.data, s.type, row * s.batch + begin * s.channel, s.channel, count);
  };
  const auto put = [&] {
    store_row(a.y.data, a.y.type, row * a.y.batch + begin * a.y.channel, y, a.y.channel, count);
  };
  if (slot < 0) {
    std::memset(y, 0, sizeof(y));
    return put();
  }
  signal(x, a.x);
  signal(step, a.dt);
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t n = least(kLanes, count - c);
    const Vec u = load(x + c);
    Vec d = load(step + c);
    if (a.dt_bias != nullptr) d += load_n(a.dt_bias + begin + c, n);
    if (a.softplus) d = softplus(d);
    store(step + c, d * splat(kLog2e));
    store(x + c, d * u);
    store(y + c, a.D != nullptr ? load_n(a.D + begin + c, n) * u : Vec{});
  }
  const int64_t group = begin / (a.dim / a.groups);
  for (int64_t n = 0; n < a.state_size; n += kPart) {
    const int64_t part = least(kPart, a.state_size - n);
    const auto matrix = [&](float* to, const StepMatrix& m) {
      load_row(to, m.data, m.type, row * m.batch + group * m.group + n * m.state, m.state, part);
    };
    matrix(B, a.B);
    matrix(C, a.C);
    for (int64_t c = 0; c < count; ++c) {
      float* h = a.state + slot * a.state_slot + (begin + c) * a.state_channel + n * a.state_n;
      y[c] += sum(advance(h, a.state_n, a.A + (begin + c) * a.state_size + n, B, C, part,
                          splat(step[c]), splat(x[c])));
    }
  }
  if (a.z.data != nullptr) {
    signal(z, a.z);
    for (int64_t c = 0; c < count; c += kLanes) store(y + c, load(y + c) * silu(load(z + c)));
  }
  put();
}

}  // namespace
}  // namespace effinfer
