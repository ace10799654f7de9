// What binary ops are made of: signs of values as rows of bits, popcounts of rows against panels of
// weights, and the way from popcounts to y. binary_conv2d is the same three on patches of pixels.
#pragma once
#include <cstdint>

#include "base/dtype.h"
#include "ops/linear/linear.h"

namespace effinfer {

namespace binary_layout {
constexpr int64_t kOutputs = 32;  // side by side in a panel
constexpr int64_t kGroup = 4;     // panels counted together
constexpr int64_t kPart = 16;     // outputs of a row side by side in counts; half a panel

// Kernels count in bytes; after this many bytes of k they must move on to 32 bits.
constexpr int64_t kFlush = 31;
static_assert(kFlush * 8 <= 255, "a byte holds the mismatches of kFlush bytes of k");

constexpr int64_t bytes_of(int64_t k) { return (k + 7) / 8; }
constexpr int64_t panels_of(int64_t n) { return (n + kOutputs - 1) / kOutputs; }
// 32-bit words of counts for so many rows of one group of panels.
constexpr int64_t counts_of(int64_t rows) { return rows * kGroup * kOutputs; }
}  // namespace binary_layout

// bits(r, i) = x(r, i) < threshold(i), a comparison that is false for NaN.
struct SignRows {
  const void* x;          // [rows, k], int32 where `integers`, else in `type`
  const void* threshold;  // [k], int32 where `integers`, else float32; null for zeros
  uint8_t* bits;          // [rows, bytes_of(k)]; the last byte's spare bits become 0
  float* mean;            // [rows] or null: mean |x|, 16 sums of every 16th element, then halves
  int64_t rows, k;
  int64_t x_stride, bits_stride;  // elements; bytes
  DType type;
  bool integers;
};

// counts = popcount(x ^ w) over `bytes` bytes, laid out [2 panels, rows, 16].
struct CountTask {
  const uint8_t* x;
  const uint8_t* weight;  // the group's first panel
  int32_t* counts;        // room for kGroup panels
  int64_t rows, panels;   // panels <= kGroup
  int64_t bytes;
  int64_t x_stride, panel_stride;  // bytes
};

// y = epilogue(xs ws (terms - 2 count) + bias) + residual for the outputs of one group of panels.
struct FinishTask {
  int32_t* counts;                   // overwritten
  const int32_t* terms;              // of each row: how many products its dot product has
  const float *weight_scale, *bias;  // of these outputs; or null
  const float* x_scale;              // of these rows; or null
  const void* residual;              // from these rows and outputs on; or null
  void* y;
  int64_t rows, outputs;
  int64_t terms_stride, residual_stride, y_stride;  // elements; 0 for the same terms in every row
  DType type;                                       // of residual and y
  Epilogue epilogue;
};

struct BinaryKernels {
  void (*signs)(const SignRows&);
  void (*count)(const CountTask&);
  void (*finish)(const FinishTask&);
};

// Copies rows of packed signs, without what lies in a last byte past k.
void copy_bits(const uint8_t* x, int64_t x_stride, int64_t rows, int64_t k, uint8_t* bits);

void binary_signs_scalar(const SignRows&);
void binary_count_scalar(const CountTask&);
void binary_finish_scalar(const FinishTask&);
void binary_signs_avx2(const SignRows&);
void binary_count_avx2(const CountTask&);
void binary_finish_avx2(const FinishTask&);
void binary_signs_avx512(const SignRows&);
void binary_count_avx512(const CountTask&);
void binary_finish_avx512(const FinishTask&);
void binary_signs_neon(const SignRows&);
void binary_count_neon(const CountTask&);
void binary_finish_neon(const FinishTask&);

}  // namespace effinfer
