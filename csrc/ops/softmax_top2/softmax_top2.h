// How sure a row of logits is: the two largest of its softmax probabilities.
//
//   y[0], y[1] = the two largest of exp(x - max) / sum(exp(x - max))
//
// One row is `dim` contiguous elements, at least one; the second of a row of one is 0. Both are NaN
// where the row holds NaN or +inf, or nothing but -inf. The sum is taken in float32 over kLanes * 4
// interleaved partial sums, in one fixed order per instruction set.
// Cost per element: one exp and about 10 flops; bytes: x twice, the second time from cache.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct SoftmaxTop2 {
  const void* x;  // [rows, dim]
  float* y;       // [rows, 2], contiguous
  int64_t rows, dim;
  int64_t x_stride;  // elements between rows
  DType type;        // x's
};

using SoftmaxTop2Fn = void (*)(const SoftmaxTop2&, int64_t row_begin, int64_t row_end);

const Kernel<SoftmaxTop2Fn>& softmax_top2_kernel();
void softmax_top2(const SoftmaxTop2& args);

void softmax_top2_scalar(const SoftmaxTop2&, int64_t, int64_t);
void softmax_top2_avx2(const SoftmaxTop2&, int64_t, int64_t);
void softmax_top2_avx512(const SoftmaxTop2&, int64_t, int64_t);
void softmax_top2_neon(const SoftmaxTop2&, int64_t, int64_t);

int softmax_top2_cuda(const SoftmaxTop2&, void* stream);  // a cudaError_t

}  // namespace effinfer
