// layer_norm on a GPU: one block per row; a pass for the mean, one for the variance and what the
// mean's rounding left, one to scale (the later ones hit L1/L2).
#include "base/gpu.h"
#include "ops/layer_norm/layer_norm.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / gpu::kWarp;

__global__ void __launch_bounds__(kThreads) normalise_row(LayerNorm a) {
  float* const scratch = gpu::shared<float>();
  const int64_t row = blockIdx.x;
  const auto value = [&](int64_t i) {
    const float x = gpu::load_any(a.x, a.x_type, row * a.x_stride + i);
    if (a.residual == nullptr) return x;
    return x + gpu::load_any(a.residual, a.residual_type, row * a.residual_stride + i);
  };
  const auto count = static_cast<float>(a.dim);
  float sum = 0.f, rest = 0.f, squares = 0.f;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) sum += value(i);
  const float mean = gpu::block_sum(sum, scratch) / count;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    const float off = value(i) - mean;
    rest += off;
    squares = gpu::fma(off, off, squares);
  }
  rest = gpu::block_sum(rest, scratch + 2 * kWarps) / count;
  const float variance = gpu::block_sum(squares, scratch + kWarps) / count - rest * rest;
  const float scale = 1.f / sqrtf(variance + a.eps);
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    const float r = value(i);
    if (a.residual_out != nullptr)
      gpu::store_any(a.residual_out, a.residual_out_type, row * a.residual_out_stride + i, r);
    const float weight = a.weight != nullptr ? a.weight[i] : 1.f;
    const float bias = a.bias != nullptr ? a.bias[i] : 0.f;
    gpu::store_any(a.y, a.x_type, row * a.y_stride + i,
                   gpu::fma((r - mean - rest) * scale, weight, bias));
  }
}

}  // namespace

int layer_norm_cuda(const LayerNorm& args, void* stream) {
  return gpu::launch(&normalise_row, dim3(static_cast<unsigned>(args.rows)), kThreads,
                     3 * kWarps * sizeof(float), stream, args);
}

}  // namespace effinfer
