// The gate of a gated MLP (SwiGLU, arXiv 2002.05202), where it cannot be a product's epilogue.
//
//   y = silu(gate) * up
//
// One row is `dim` contiguous elements; all three have one type, computed in float32.
// Cost per element: one exp and about 10 flops; bytes: gate, up, y once.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct SiluMul {
  const void* gate;  // [rows, dim]
  const void* up;    // [rows, dim]
  void* y;           // [rows, dim]; may be gate or up
  int64_t rows, dim;
  int64_t gate_stride, up_stride, y_stride;  // elements between rows
  DType type;
};

using SiluMulFn = void (*)(const SiluMul&, int64_t row_begin, int64_t row_end);

const Kernel<SiluMulFn>& silu_mul_kernel();
void silu_mul(const SiluMul& args);

void silu_mul_scalar(const SiluMul&, int64_t, int64_t);
void silu_mul_avx2(const SiluMul&, int64_t, int64_t);
void silu_mul_avx512(const SiluMul&, int64_t, int64_t);
void silu_mul_neon(const SiluMul&, int64_t, int64_t);

int silu_mul_cuda(const SiluMul&, void* stream);  // a cudaError_t

}  // namespace effinfer
