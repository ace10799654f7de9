// hidden_attention on a GPU: a thread is a column j of one channel's alpha and walks down the rows,
// a few states at a time in registers; each pass after the first adds to what the last one wrote.
#include "base/gpu.h"
#include "ops/hidden_attention/hidden_attention.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;
constexpr int kStates = 8;  // per pass

__global__ void __launch_bounds__(kThreads) attend(HiddenAttention a, int64_t column_blocks) {
  const int64_t row = blockIdx.x / column_blocks;
  const int64_t first = blockIdx.x % column_blocks * kThreads, j = first + threadIdx.x;
  if (j >= a.length) return;
  const int64_t batch = row / a.dim, channel = row % a.dim;
  float* const alpha = a.alpha + row * a.length * a.length + j;
  const float* const A = a.A + channel * a.state;
  const float bias = a.delta_bias != nullptr ? a.delta_bias[channel] : 0.f;
  const auto step = [&](int64_t t) {
    const ScanSignal& s = a.delta;
    const int64_t at = batch * s.batch + channel * s.channel + t * s.time;
    const float x = gpu::load_any(s.data, s.type, at) + bias;
    return a.softplus ? gpu::softplus(x) : x;
  };
  const auto element = [&](const ScanMatrix& m, int64_t n, int64_t t) {
    const int64_t at = batch * m.batch + channel / (a.dim / m.groups) * m.group;
    return gpu::load_any(m.data, m.type, at + n * m.state + t * m.time);
  };

  for (int64_t i = 0; i < a.length; ++i) alpha[i * a.length] = 0.f;
  for (int64_t n = 0; n < a.state; n += kStates) {
    const int states = static_cast<int>(a.state - n < kStates ? a.state - n : kStates);
    float h[kStates];
    for (int64_t i = j; i < a.length; ++i) {
      const float d = step(i);
      float sum = alpha[i * a.length];
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (k >= states) break;
        h[k] = i == j ? d * element(a.B, n + k, j) : h[k] * expf(d * A[n + k]);
        sum = gpu::fma(element(a.C, n + k, i), h[k], sum);
      }
      alpha[i * a.length] = sum;
    }
  }
}

}  // namespace

int hidden_attention_cuda(const HiddenAttention& args, void* stream) {
  const int64_t column_blocks = (args.length + kThreads - 1) / kThreads;
  const int64_t blocks = args.batch * args.dim * column_blocks;
  if (blocks > gpu::kMaxGridX) return gpu::kInvalidValue;
  return gpu::launch(&attend, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, args,
                     column_blocks);
}

}  // namespace effinfer
