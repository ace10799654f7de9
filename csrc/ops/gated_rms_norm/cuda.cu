// gated_rms_norm on a GPU: one block per row and group, two passes (the second hits L1/L2).
#include "base/gpu.h"
#include "ops/gated_rms_norm/gated_rms_norm.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) normalise_group(GatedRmsNorm a, int64_t groups) {
  const int64_t row = blockIdx.x / groups, first = blockIdx.x % groups * a.group;
  const auto input = [&](int64_t i) {
    return gpu::load_any(a.x, a.type, row * a.x_stride + first + i);
  };
  const auto gate = [&](int64_t i) {
    return a.z != nullptr ? gpu::silu(gpu::load_any(a.z, a.type, row * a.z_stride + first + i))
                          : 1.f;
  };
  const auto value = [&](int64_t i) { return a.norm_before_gate ? input(i) : input(i) * gate(i); };
  float squares = 0.f;
  for (int64_t i = threadIdx.x; i < a.group; i += kThreads) {
    const float v = value(i);
    squares = gpu::fma(v, v, squares);
  }
  const float mean = gpu::block_sum(squares, gpu::shared<float>()) / static_cast<float>(a.group);
  const float scale = 1.f / sqrtf(mean + a.eps);
  for (int64_t i = threadIdx.x; i < a.group; i += kThreads) {
    const float weight = a.weight != nullptr ? a.weight[first + i] : 1.f;
    const float normed = value(i) * scale * weight;
    gpu::store_any(a.y, a.type, row * a.y_stride + first + i,
                   a.norm_before_gate ? normed * gate(i) : normed);
  }
}

}  // namespace

int gated_rms_norm_cuda(const GatedRmsNorm& args, void* stream) {
  const int64_t groups = args.dim / args.group;
  return gpu::launch(&normalise_group, dim3(static_cast<unsigned>(args.rows * groups)), kThreads,
                     kThreads / gpu::kWarp * sizeof(float), stream, args, groups);
}

}  // namespace effinfer
