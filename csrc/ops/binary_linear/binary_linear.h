// y = epilogue(xs[b] ws[n] dot(sign x[b], sign w[n]) + bias[n]) + residual: XNOR-Net's binary layer
// (arXiv 1603.05279), from one bit per sign.
//
// A bit is 1 where a value is negative (x < 0), so zeros of both signs and NaN count as +1, and
// dot = k - 2 popcount(x ^ w) is exact. Then, each rounded once to float32,
//   v = fma(float(dot) * ws, xs, bias), or fma(float(dot), ws, bias) where there is no xs;
// without epilogue every instruction set, number of threads and of rows gives the same bits.
//
// Packed weights: [panels, ceil(k / 8), 32] bytes, a panel of 32 outputs side by side: bit b of
// byte [p, i, j] is the sign of w(32 p + j, 8 i + b); bits past n and k are 0. A prefix of outputs
// (whole panels) or of k (whole bytes) is a prefix of the array: the stride between panels is an
// argument. Packed activations: rows of ceil(k / 8) bytes, bit b of byte i the sign of x(8 i + b);
// bits past k are ignored.
//
// Cost: 2 rows n k operations; bytes: n k / 8 of weights (again for each 96 rows), x and y. The
// AVX2 kernel looks up popcount(x ^ w) of four k of 32 outputs in one pshufb: 512 operations a
// cycle at most on Zen 3, of which a 4 x 64 tile reaches 280.
#pragma once
#include <cstddef>

#include "base/cpu.h"
#include "base/dtype.h"
#include "ops/binary_linear/bits.h"
#include "ops/linear/linear.h"

namespace effinfer {

struct BinaryLinear {
  const void* x;              // [rows, k] in x_type, or packed rows where x_is_bits
  const uint8_t* weight;      // packed, see above
  const float* weight_scale;  // [n], or null for 1
  const float* bias;          // [n] or null
  const float* x_scale;       // [rows], or null for 1
  const void* residual;       // [rows, n] in y_type, or null
  void* y;                    // [rows, n] in y_type
  int64_t rows, n, k;
  int64_t panel_stride;                         // bytes between panels of the weights
  int64_t x_stride, residual_stride, y_stride;  // elements between rows (bytes of packed x)
  DType x_type, y_type;
  bool x_is_bits;
  bool mean_scale;    // xs = mean |x[b]|; then x_scale is null and x_is_bits false
  Epilogue epilogue;  // one that takes one matrix
  void* scratch;      // binary_linear_scratch() bytes, 64-byte aligned
  int64_t slots;      // how many threads may work: one part of the scratch each
};

const Kernel<BinaryKernels>& binary_linear_kernel();
size_t binary_linear_scratch(const BinaryLinear& args);  // bytes; reads the sizes and slots
void binary_linear(const BinaryLinear& args);

// Floats of device memory that binary_linear_cuda() takes as scratch.
int64_t binary_linear_cuda_scratch(const BinaryLinear& args);
int binary_linear_cuda(const BinaryLinear&, void* stream);  // a cudaError_t

}  // namespace effinfer
