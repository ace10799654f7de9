// rms_norm on a GPU: one block per row, two passes over it (the second hits L1/L2).
#include "base/gpu.h"
#include "ops/rms_norm/rms_norm.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;

template <class X>
__global__ void __launch_bounds__(kThreads) normalise_row(RmsNorm a) {
  const int64_t row = blockIdx.x;
  const auto* x = static_cast<const X*>(a.x) + row * a.x_stride;
  auto* y = static_cast<X*>(a.y) + row * a.y_stride;
  const float* weight = a.index != nullptr ? a.weight + a.index[row] * a.dim : a.weight;
  const int64_t residual = row * a.residual_stride, out = row * a.residual_out_stride;
  const auto value = [&](int64_t i) {
    const float v = gpu::load(x + i);
    return a.residual == nullptr ? v : v + gpu::load_any(a.residual, a.residual_type, residual + i);
  };
  float squares = 0.f;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    const float r = value(i);
    squares += r * r;
  }
  const float mean = gpu::block_sum(squares, gpu::shared<float>()) / static_cast<float>(a.dim);
  const float scale = 1.f / sqrtf(mean + a.eps), offset = a.unit_offset ? 1.f : 0.f;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    const float r = value(i);  // before y, which may be x itself
    if (a.residual_out != nullptr) gpu::store_any(a.residual_out, a.residual_out_type, out + i, r);
    const float w = weight == nullptr ? 1.f : weight[i] + offset;
    gpu::store(y + i, r * scale * w);
  }
}

}  // namespace

int rms_norm_cuda(const RmsNorm& args, void* stream) {
  int status = 0;
  with_type(args.x_type, [&](auto x) {
    status = gpu::launch(&normalise_row<decltype(x)>, dim3(static_cast<unsigned>(args.rows)),
                         kThreads, kThreads / gpu::kWarp * sizeof(float), stream, args);
  });
  return status;
}

}  // namespace effinfer
