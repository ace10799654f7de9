// RMSNorm with an optional residual add (arXiv 1910.07467).
//
//   r = x + residual                       (r = x without a residual)
//   y = r * rsqrt(mean(r^2) + eps) * w     (w: 1, weight, or 1 + weight with unit_offset)
//
// One row is `dim` contiguous elements. The sum of squares is taken in float32 over kLanes * 4
// interleaved partial sums, in one fixed order per instruction set.
// Types: residual and residual_out are each float32 or x's type (ops/norm/types.h).
// Cost per row: 4 dim flops; bytes: x, residual, y, residual_out once, weight from cache.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct RmsNorm {
  const void* x;                   // [rows, dim]
  const void* residual;            // [rows, dim] or null
  const float* weight;             // [dim] or null; [lines, dim] where there is an index
  const int32_t* index = nullptr;  // [rows], each row's line of weight, or null
  void* y;                         // [rows, dim]
  void* residual_out;              // [rows, dim] or null: r, written before it is normalised
  int64_t rows, dim;
  int64_t x_stride, residual_stride, y_stride, residual_out_stride;  // elements between rows
  DType x_type, residual_type, residual_out_type;                    // y has x's type
  float eps;
  bool unit_offset;
};

using RmsNormFn = void (*)(const RmsNorm&, int64_t row_begin, int64_t row_end);

const Kernel<RmsNormFn>& rms_norm_kernel();
void rms_norm(const RmsNorm& args);

void rms_norm_scalar(const RmsNorm&, int64_t, int64_t);
void rms_norm_avx2(const RmsNorm&, int64_t, int64_t);
void rms_norm_avx512(const RmsNorm&, int64_t, int64_t);
void rms_norm_neon(const RmsNorm&, int64_t, int64_t);

int rms_norm_cuda(const RmsNorm&, void* stream);  // a cudaError_t

}  // namespace effinfer
