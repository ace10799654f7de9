// hidden_attention over vec.h: a few vectors of columns of alpha at a time, one state of each a
// lane.
#include "ops/hidden_attention/hidden_attention.h"
#include "ops/scan/rows.h"

namespace effinfer {
namespace {

constexpr int kVectors = 4;  // as many sums as an FMA takes cycles
constexpr int64_t kColumns = kVectors * kLanes;

// to[t][n], rows `width` apart, = B or C of this row at every position.
void gather_matrix(float* to, const ScanMatrix& m, const HiddenAttention& a, int64_t row,
                   int64_t width) {
  const int64_t at = row / a.dim * m.batch + row % a.dim / (a.dim / m.groups) * m.group;
  for (int64_t t = 0; t < a.length; ++t)
    load_row(to + t * width, m.data, m.type, at + t * m.time, m.state, a.state);
}

void attend_row(const HiddenAttention& args, int64_t row, float* scratch) {
  const HiddenAttention a = args;
  const int64_t length = a.length, state = a.state, channel = row % a.dim;
  const int64_t width = (state + kLanes - 1) / kLanes * kLanes;
  // scratch_floats() of hidden_attention.cpp counts these.
  float* const decay = scratch;  // [t][n], as input and C
  float* const input = decay + length * width;
  float* const C = input + length * width;
  float* const A = C + length * width;
  float* const h = A + width;  // [n][column]
  float* const step = h + state * kColumns;
  float* const alpha = a.alpha + row * length * length;

  load_row(A, a.A + channel * state, 1, state);
  load_row(step, a.delta.data, a.delta.type,
           row / a.dim * a.delta.batch + channel * a.delta.channel, a.delta.time, length);
  gather_matrix(input, a.B, a, row, width);
  gather_matrix(C, a.C, a, row, width);
  std::memset(h, 0, static_cast<size_t>(state * kColumns) * sizeof(float));
  const Vec bias = splat(a.delta_bias != nullptr ? a.delta_bias[channel] : 0.f);
  for (int64_t t = 0; t < length; t += kLanes) {
    const Vec x = load(step + t) + bias;
    store(step + t, a.softplus ? softplus(x) : x);
  }
  for (int64_t t = 0; t < length; ++t) {
    const Vec d = splat(step[t]);
    for (int64_t n = t * width; n < (t + 1) * width; n += kLanes) {
      store(decay + n, exp(d * load(A + n - t * width)));
      store(input + n, d * load(input + n));
    }
  }

  for (int64_t j = 0; j < length; j += kColumns) {
    for (int64_t i = j; i < length; ++i) {
      const float *decays = decay + i * width, *weights = C + i * width;
      const bool starting = i - j < kColumns;  // a column a row; until then it holds anything
      Vec sum[kVectors] = {};
      for (int64_t n = 0; n < state; ++n) {
        float* const states = h + n * kColumns;
        Vec next[kVectors];
        EFFINFER_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          next[v] = load(states + v * kLanes) * splat(decays[n]);
          store(states + v * kLanes, next[v]);
        }
        if (starting) {
          states[i - j] = input[i * width + n];
          EFFINFER_UNROLL
          for (int v = 0; v < kVectors; ++v) next[v] = load(states + v * kLanes);
        }
        EFFINFER_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[v] = fma(splat(weights[n]), next[v], sum[v]);
      }
      float* const to = alpha + i * length + j;
      EFFINFER_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = length - j - v * kLanes;
        if (left >= kLanes)
          store(to + v * kLanes, sum[v]);
        else if (left > 0)
          store_n(to + v * kLanes, sum[v], left);
      }
    }
  }
  for (int64_t i = 0; i + 1 < length; ++i)
    std::memset(alpha + i * length + i + 1, 0, static_cast<size_t>(length - i - 1) * sizeof(float));
}

}  // namespace
}  // namespace effinfer
