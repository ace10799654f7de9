// LayerNorm with an optional residual add (arXiv 1607.06450).
//
//   r = x + residual                       (r = x without a residual)
//   y = (r - mean(r)) * rsqrt(mean((r - mean(r))^2) + eps) * weight + bias
//
// One row is `dim` contiguous elements. Mean and variance are two sums in float32, each over
// kLanes * 4 interleaved partial sums, in one fixed order per instruction set; taking the variance
// around the mean keeps rows with a large mean exact.
// Types: residual and residual_out are each float32 or x's type (ops/norm/types.h).
// Cost per row: 7 dim flops; bytes: x, residual, y, residual_out once, weight and bias from cache.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct LayerNorm {
  const void* x;         // [rows, dim]
  const void* residual;  // [rows, dim] or null
  const float* weight;   // [dim] or null for 1
  const float* bias;     // [dim] or null for 0
  void* y;               // [rows, dim]
  void* residual_out;    // [rows, dim] or null: r, written before it is normalised
  int64_t rows, dim;
  int64_t x_stride, residual_stride, y_stride, residual_out_stride;  // elements between rows
  DType x_type, residual_type, residual_out_type;                    // y has x's type
  float eps;
};

using LayerNormFn = void (*)(const LayerNorm&, int64_t row_begin, int64_t row_end);

const Kernel<LayerNormFn>& layer_norm_kernel();
void layer_norm(const LayerNorm& args);

void layer_norm_scalar(const LayerNorm&, int64_t, int64_t);
void layer_norm_avx2(const LayerNorm&, int64_t, int64_t);
void layer_norm_avx512(const LayerNorm&, int64_t, int64_t);
void layer_norm_neon(const LayerNorm&, int64_t, int64_t);

int layer_norm_cuda(const LayerNorm&, void* stream);  // a cudaError_t

}  // namespace effinfer
