// Gated RMSNorm over groups of channels (Mamba-2, arXiv 2405.21060).
//
//   norm(r) = r * rsqrt(mean over the group of r^2 + eps) * weight
//   y = norm(x * silu(z))          norm_before_gate = false
//   y = norm(x) * silu(z)          norm_before_gate = true;   without z, silu(z) counts as 1
//
// One row is `dim` contiguous elements, dim a multiple of `group`. The sum of squares is taken in
// float32 over kLanes * 4 interleaved partial sums, in one fixed order per instruction set.
// Cost per row: 5 dim flops and dim silus (about 9 cycles for 8 on AVX2); bytes: x, z, y once,
// weight from cache. On AVX2 11 cycles for 8 in all; of 16-bit types 15, as converting costs more
// than half the bytes save.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct GatedRmsNorm {
  const void* x;        // [rows, dim]
  const void* z;        // [rows, dim] or null
  const float* weight;  // [dim] or null for 1
  void* y;              // [rows, dim]
  int64_t rows, dim, group;
  int64_t x_stride, z_stride, y_stride;  // elements between rows
  DType type;                            // of x, z and y
  float eps;
  bool norm_before_gate;
};

using GatedRmsNormFn = void (*)(const GatedRmsNorm&, int64_t row_begin, int64_t row_end);

const Kernel<GatedRmsNormFn>& gated_rms_norm_kernel();
void gated_rms_norm(const GatedRmsNorm& args);

void gated_rms_norm_scalar(const GatedRmsNorm&, int64_t, int64_t);
void gated_rms_norm_avx2(const GatedRmsNorm&, int64_t, int64_t);
void gated_rms_norm_avx512(const GatedRmsNorm&, int64_t, int64_t);
void gated_rms_norm_neon(const GatedRmsNorm&, int64_t, int64_t);

int gated_rms_norm_cuda(const GatedRmsNorm&, void* stream);  // a cudaError_t

}  // namespace effinfer
