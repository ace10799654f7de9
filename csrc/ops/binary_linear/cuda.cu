// binary_linear on a GPU: signs to bits and mean magnitudes, then counting (cuda_bits.h).
#include "ops/binary_linear/binary_linear.h"
#include "ops/binary_linear/cuda_bits.h"

namespace effinfer {
namespace {

constexpr int kSumLanes = 16;  // partial sums of a row's magnitudes, as on the CPU

template <class X>
__global__ void mean_magnitudes(const X* x, int64_t stride, int64_t rows, int64_t k, float* mean) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kSumLanes) + threadIdx.x / kSumLanes;
  const int64_t first = threadIdx.x % kSumLanes;
  float sum = 0.f;
  for (int64_t i = first; row < rows && i < k; i += kSumLanes)
    sum += fabsf(gpu::load(x + row * stride + i));
  sum = gpu::lanes_sum<kSumLanes>(sum);
  if (row < rows && first == 0) mean[row] = sum / static_cast<float>(k);
}

struct LinearFinish {
  FloatFinish finish;
  int terms;
  __device__ void operator()(int64_t row, int64_t n, int count) const {
    finish(row, n, terms, count);
  }
};

template <class X>
int take_signs(const BinaryLinear& a, uint8_t* bits, int64_t stride, float* mean, void* stream) {
  const auto* x = static_cast<const X*>(a.x);
  if (a.mean_scale) {
    const int64_t blocks = ceil_div(a.rows, kThreads / kSumLanes);
    if (blocks > gpu::kMaxGridX) return gpu::kInvalidValue;
    const int status = gpu::launch(mean_magnitudes<X>, dim3(static_cast<unsigned>(blocks)),
                                   kThreads, 0, stream, x, a.x_stride, a.rows, a.k, mean);
    if (status != 0) return status;
  }
  const SignBytes<X, float> source = {x, nullptr, a.x_stride, a.k};
  return launch_bits(source, bits, a.rows, stride, stream);
}

}  // namespace

int64_t binary_linear_cuda_scratch(const BinaryLinear& a) {
  return floats_of(a.rows * padded_bytes(bytes_of(a.k))) + (a.mean_scale ? a.rows : 0);
}

int binary_linear_cuda(const BinaryLinear& a, void* stream) {
  if (a.rows <= 0 || a.n <= 0) return 0;
  const int64_t stride = padded_bytes(bytes_of(a.k));
  auto* const bits = static_cast<uint8_t*>(a.scratch);
  float* const mean = static_cast<float*>(a.scratch) + floats_of(a.rows * stride);
  int status = 0;
  if (a.x_is_bits) {
    const CopiedBytes source = {static_cast<const uint8_t*>(a.x), a.x_stride, a.k};
    status = launch_bits(source, bits, a.rows, stride, stream);
  } else {
    with_type(a.x_type,
              [&](auto x) { status = take_signs<decltype(x)>(a, bits, stride, mean, stream); });
  }
  if (status != 0) return status;
  const BitProblem problem = {bits, a.weight, stride, a.panel_stride, bytes_of(a.k), a.rows, a.n};
  const FloatFinish finish = {a.weight_scale, a.bias,   a.mean_scale ? mean : a.x_scale,
                              a.residual,     a.y,      a.residual_stride,
                              a.y_stride,     a.y_type, a.epilogue};
  return launch_count(problem, LinearFinish{finish, static_cast<int>(a.k)}, stream);
}

}  // namespace effinfer
