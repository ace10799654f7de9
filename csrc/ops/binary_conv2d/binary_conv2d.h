// Convolution of signs, NHWC: patches of pixels' bits against packed weights, on binary_linear's
// counting. A bit is 1 where x < threshold (0 by default): -1; zero counts as +1.
//
// Either y = epilogue(ws[n] dot + bias[n]) + residual in float32, or, where `fixed` is set, the
// block of A&B BNN (CVPR 2024, arXiv 2403.03739) in 32-bit integers, additions and shifts alone:
//   a = (dot << gain_shift[n]) + residual + pre_bias[n]
//   y = clamp((a < 0 ? a >> slope_shift[n] : a) + post_bias[n]), >> rounding down,
// with residual and y within +-kFixedLimit: that is enforced, so that nothing overflows.
//
// Padding: taps outside the image are +1 (pad_ones), or contribute nothing (zero padding): they are
// counted as +1 too, then the popcounts of their weights are taken back and the dot product has
// fewer terms.
//
// Packed weights: binary_linear's panels over k = taps in row-major order, each ceil(channels / 8)
// bytes; so spare bits lie between taps, 0 in x and in the weights.
//
// Cost: 2 pixels n taps channels operations; a patch's bits are copied once for all outputs.
#pragma once
#include <cstddef>

#include "base/cpu.h"
#include "base/dtype.h"
#include "ops/binary_linear/bits.h"

namespace effinfer {

namespace binary_layout {
constexpr int32_t kFixedLimit = 1 << 29;
constexpr int32_t kMostBias = 1 << 28;
// |a| <= products + residual + bias, |y| <= |a| + bias.
static_assert(int64_t{kFixedLimit} * 2 + int64_t{kMostBias} * 2 < INT32_MAX, "no sum overflows");
}  // namespace binary_layout

// Per output channel; for all of them |dot| << gain_shift <= kFixedLimit, |bias| <= kMostBias.
struct FixedEpilogue {
  const int32_t* gain_shift;   // [n], 0..29
  const int32_t* pre_bias;     // [n]
  const int32_t* slope_shift;  // [n], 0..31
  const int32_t* post_bias;    // [n]
};

struct BinaryConv2d {
  const void* x;          // [batch, height, width, channels], or their bits
  const void* threshold;  // [channels] in float32 (int32 where x is int32), or null for zeros
  const uint8_t* weight;  // packed, see above
  const float *weight_scale, *bias;  // [n] or null; not read where `fixed`
  FixedEpilogue fixed_epilogue;
  const void* residual;  // [batch, out_height, out_width, n] in y's type, or null
  void* y;               // the same, in y_type or int32 where `fixed`
  int64_t batch, height, width, channels;
  int64_t out_height, out_width, n;
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // vertical, horizontal
  int64_t panel_stride;                                   // bytes between panels of the weights
  DType x_type, y_type;
  bool x_is_bits, x_is_integer, pad_ones, fixed;
  Epilogue epilogue;
  void* scratch;  // binary_conv2d_scratch() bytes, 64-byte aligned
  int64_t slots;  // how many threads may work: one part of the scratch each
};

// The fixed epilogue of some pixels and one group of panels, as FinishTask.
struct FixedTask {
  const int32_t* counts;
  const int32_t* terms;
  FixedEpilogue epilogue;  // from these outputs on
  const int32_t* residual;
  int32_t* y;
  int64_t rows, outputs;
  int64_t y_stride;  // of residual too
};

using BinaryConv2dFn = void (*)(const FixedTask&);

const Kernel<BinaryConv2dFn>& binary_conv2d_kernel();
size_t binary_conv2d_scratch(const BinaryConv2d& args);  // bytes; reads the sizes and slots
void binary_conv2d(const BinaryConv2d& args);

void binary_conv2d_scalar(const FixedTask&);
void binary_conv2d_avx2(const FixedTask&);
void binary_conv2d_avx512(const FixedTask&);
void binary_conv2d_neon(const FixedTask&);

// Floats of device memory that binary_conv2d_cuda() takes as scratch.
int64_t binary_conv2d_cuda_scratch(const BinaryConv2d& args);
int binary_conv2d_cuda(const BinaryConv2d&, void* stream);  // a cudaError_t

}  // namespace effinfer
