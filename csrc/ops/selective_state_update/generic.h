// selective_state_update over vec.h: states in the lanes where they are advanced, channels where
// they are summed; kPart states at a time.
#include "ops/scan/rows.h"
#include "ops/selective_state_update/selective_state_update.h"

namespace effinfer {
namespace {

constexpr int64_t kPart = 256;  // states whose B and C are kept on the stack

// Up to kLanes channels, from some state on; step and input are one value a channel.
struct Tile {
  float* h;
  int64_t h_channel, h_state;  // strides
  const float* A;
  int64_t A_channel;
  const float *B, *C, *step, *input;
};

// Advances `states` <= kLanes states of `channels` <= kLanes channels, and adds C h to y, whose
// lanes are channels. Each step is rounded as in selective_scan, and y is summed in its order,
// state after state: a step has the bits of a scan of one token.
template <bool kWhole>  // kLanes of both, dense
EFFINFER_INLINE Vec advance(const Tile& t, int64_t channels, int64_t states, Vec y) {
  const Vec B = load(t.B);
  const auto next = [&](int64_t c, Vec before, Vec a) {
    const Vec decay = exp2(splat(t.step[c]) * (a * splat(kLog2e)));
    return fma(decay, before, splat(t.input[c]) * B);
  };
  Vec h[kLanes] = {};
  if constexpr (kWhole) {
    EFFINFER_UNROLL
    for (int c = 0; c < kLanes; ++c) {
      float* const at = t.h + c * t.h_channel;
      h[c] = next(c, load(at), load(t.A + c * t.A_channel));
      store(at, h[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      float* const at = t.h + c * t.h_channel;
      h[c] = next(c, load_strided(at, t.h_state, states), load_n(t.A + c * t.A_channel, states));
      store_strided(at, t.h_state, h[c], states);
    }
  }
  transpose(h);
  EFFINFER_UNROLL
  for (int n = 0; n < kLanes; ++n)
    if (kWhole || n < states) y = fma(splat(t.C[n]), h[n], y);
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
    store(step + c, d);
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
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t channels = least(kLanes, count - c), channel = begin + c;
      Vec sum = load(y + c);
      for (int64_t i = 0; i < part; i += kLanes) {
        const int64_t states = least(kLanes, part - i);
        const Tile tile = {
            .h = a.state + slot * a.state_slot + channel * a.state_channel + (n + i) * a.state_n,
            .h_channel = a.state_channel,
            .h_state = a.state_n,
            .A = a.A + channel * a.state_size + n + i,
            .A_channel = a.state_size,
            .B = B + i,
            .C = C + i,
            .step = step + c,
            .input = x + c};
        const bool whole = channels == kLanes && states == kLanes && a.state_n == 1;
        sum = whole ? advance<true>(tile, channels, states, sum)
                    : advance<false>(tile, channels, states, sum);
      }
      store(y + c, sum);
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
