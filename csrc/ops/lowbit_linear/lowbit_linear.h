// y = epilogue(x W^T + bias) + residual for weights of 8 bits down to 1, packed once.
//
// A weight is w[n, k] = scale[n, g] * float(value[n, k] - zero[n, g]) + offset[n, g], g = k / group
// (a group's last one may be short). `value` is what a format's code means:
//   int8 u - 128, int4 u - 8, int3 u - 4, int2 u - 2, ternary u - 1, binary 2u - 1,
// zero is an integer in a code's units (stored as a code: value and zero lose the same constant, so
// value - zero = u - zero_code), offset a float; each may be absent.
//
// Packed weights: [panels, units, bytes of a unit], panels of 16 outputs (two matrices interleaved
// panel by panel for the *_mul epilogues, as in linear), units of so many k:
//   int8           4 k,  64 bytes: byte 4r + i is value(r, i) as s8
//   int4           8 k,  64 bytes: byte 4r + i has u(r, i) in its low, u(r, 4 + i) in its high half
//   int2, ternary 16 k,  64 bytes: byte 4r + i has u(r, 4p + i) in bits 2p and 2p + 1
//   int3          32 k, 192 bytes: the low two bits as two units of int2, then 64 bytes whose byte
//                       4r + i has the high bit of u(r, 4p + i) in bit p
//   ternary_dense 48 k, 160 bytes: with v = 9 value(r, 3t) + 3 value(r, 3t + 1) + value(r, 3t + 2),
//                       byte 16j + r has |v| of t = 2j in its low, of t = 2j + 1 in its high half
//                       (j < 8), then 16 little-endian words whose bit t says v < 0: 5/3 bits
//   binary        32 k,  64 bytes: byte 16j + r has u(r, 8j + b) in bit b (j < 4)
// so that 64 bytes are what an AVX-512 register, two of AVX2 or four of NEON hold: outputs side by
// side, four consecutive k each, which is what dot-product instructions take. Codes past k or n are
// zero. A prefix of outputs (whole panels) or of k (whole units and groups) is a prefix of the
// array: strides are arguments.
//
// Activations, one of
// - float: x as it is; the result is linear()'s on the dequantized float32 weight, bit for bit. (On
//   a GPU only for float32 x. 16-bit x goes through tensor cores, times value - zero, and scales
//   multiply the sums: as close to float64, and a row's bits still its own.)
// - int8: xs = absmax(x[b]) / 127, xq = rne(x * (127 / absmax)), never -128. A row of zeros, or
//   one whose 127 / absmax is no finite float32, has xs = 0 and xq = 0; a row with NaN or infinity
//   gives NaN. With S = sum of (value - zero) * xq over a group, an exact int32, and X the sum of
//   xq there,
//     t = fma(scale, float(S), t), then t = fma(offset, float(X), t) where there is an offset
//   for ascending g from t = 0, and xs * t enters the epilogue. Every instruction set, number of
//   threads and of rows gives the same bits of it.
#pragma once
#include <cstddef>

#include "base/cpu.h"
#include "base/dtype.h"
#include "ops/linear/linear.h"

namespace effinfer {

enum class LowbitFormat : int8_t { int8, int4, int3, int2, ternary, ternary_dense, binary };

namespace lowbit {

struct Layout {
  int unit_k, unit_bytes;
  int max_code;      // codes are 0 .. max_code
  int step, centre;  // value = step * code - centre
};

constexpr Layout layout(LowbitFormat f) {
  switch (f) {
    case LowbitFormat::int8:
      return {4, 64, 255, 1, 128};
    case LowbitFormat::int4:
      return {8, 64, 15, 1, 8};
    case LowbitFormat::int3:
      return {32, 192, 7, 1, 4};
    case LowbitFormat::int2:
      return {16, 64, 3, 1, 2};
    case LowbitFormat::ternary:
      return {16, 64, 2, 1, 1};
    case LowbitFormat::ternary_dense:
      return {48, 160, 2, 1, 1};
    case LowbitFormat::binary:
      return {32, 64, 1, 2, 1};
  }
  return {};
}

// A group is a multiple of this, or all of k; for ternary_dense all of k.
constexpr int64_t group_step(LowbitFormat f) {
  return f == LowbitFormat::int3 || f == LowbitFormat::binary ? 32 : 16;
}

}  // namespace lowbit

struct LowbitWeight {
  const uint8_t* packed;  // [panels, units, unit bytes]
  const void* scale;      // [panels, groups, 16] in scale_type
  const uint8_t* zero;    // [panels, groups, 16] codes, or null for the format's centre
  const void* offset;     // [panels, groups, 16] in scale_type, or null
  int64_t panel_stride;   // bytes between panels
  int64_t scale_stride;   // elements between panels of scale, zero and offset
  int64_t group;          // k per scale
  DType scale_type;
  LowbitFormat format;
};

struct LowbitLinear {
  Linear io;  // x, bias, residual, y and their sizes; its weight and weight_type are not used
  LowbitWeight weight;
  bool int8_activations;
  // For layers of integers, with int8 activations only; io.x_type is float32 with x_scale.
  const float* x_scale;     // [rows]: x holds int8 codes of -127 .. 127 with these scales; or null
  const float* multiplier;  // [n]: y holds int8: rne(min(max(v * multiplier[n], low), high)), where
                            // a NaN becomes low; or null
  float low, high;
};

// int8 activations: what quantizing makes of x, and the kernels read.
struct LowbitRows {
  int8_t* codes;   // [rows, stride]: k codes, then zeros
  float* scale;    // [rows]: xs
  int32_t* sums;   // [rows, groups]: X
  int64_t stride;  // a multiple of 64 that holds whole units of every format
  int64_t groups;
  uint8_t* tables;       // [rows, table_stride]: sums that kernels may look up; null where
  int64_t table_stride;  // lowbit::table_bytes() is 0
  uint16_t* reach;       // [spans, rows]; null where lowbit::spans() is 0
};

namespace lowbit {
constexpr int64_t kSideBySide = 4;  // panels that walk down k together where rows are few
constexpr int64_t kBlock = 256;     // k of a panel decoded at a time

// Bytes of tables for each row: for formats of under two bits and few rows, whose sums are sooner
// looked up than decoded weights are multiplied.
constexpr int64_t table_bytes(const LowbitLinear& a) {
  const int64_t unit_k = layout(a.weight.format).unit_k, units = (a.io.k + unit_k - 1) / unit_k;
  if (a.weight.format == LowbitFormat::binary && a.io.rows <= 4) return units * 256;
  if (a.weight.format == LowbitFormat::ternary_dense && a.io.rows <= 8) return units * 512;
  return 0;
}

// Where 16-bit sums of products must not wrap, spans of so many k say how large they can become:
// with codes of at most c, c times the span's reach.
constexpr int64_t kSpan = 64;
constexpr int64_t spans(const LowbitLinear& a) {
  const bool wide = a.weight.format == LowbitFormat::int4 || a.weight.format == LowbitFormat::int3;
  return wide && a.io.rows > 1 ? (a.io.k + kSpan - 1) / kSpan : 0;
}
}  // namespace lowbit

// Quantizes so many rows of x, from `row` on.
using LowbitQuantizeFn = void (*)(const LowbitLinear&, const LowbitRows&, int64_t row,
                                  int64_t rows);
// One task with int8 activations; its scratch: lowbit_int8_scratch(task.rows) floats.
using LowbitInt8Fn = void (*)(const LowbitLinear&, const LowbitRows&, const LinearTask&);
// One task with float activations; tasks and scratch are as linear()'s on float32 weights.
using LowbitFloatFn = void (*)(const LowbitLinear&, const LinearTask&);

struct LowbitKernels {
  LowbitQuantizeFn quantize;
  LowbitInt8Fn int8;
  LowbitFloatFn floats;
};

// Sums and integer sums of the panels side by side, and a block of one decoded.
constexpr int64_t lowbit_int8_scratch(int64_t rows) {
  using linear_layout::kPanel;
  return 2 * lowbit::kSideBySide * rows * kPanel + lowbit::kBlock * kPanel / 4;
}

const Kernel<LowbitKernels>& lowbit_linear_kernel();
size_t lowbit_linear_scratch(const LowbitLinear& args);  // bytes; reads sizes, slots and formats
void lowbit_linear(const LowbitLinear& args);

void lowbit_quantize_scalar(const LowbitLinear&, const LowbitRows&, int64_t row, int64_t rows);
void lowbit_int8_scalar(const LowbitLinear&, const LowbitRows&, const LinearTask&);
void lowbit_float_scalar(const LowbitLinear&, const LinearTask&);

void lowbit_float_avx2(const LowbitLinear&, const LinearTask&);
void lowbit_float_avx512(const LowbitLinear&, const LinearTask&);
void lowbit_float_neon(const LowbitLinear&, const LinearTask&);

void lowbit_quantize_avx2(const LowbitLinear&, const LowbitRows&, int64_t row, int64_t rows);
void lowbit_int8_avx2(const LowbitLinear&, const LowbitRows&, const LinearTask&);

void lowbit_int8_avx512_vnni(const LowbitLinear&, const LowbitRows&, const LinearTask&);

void lowbit_quantize_neon(const LowbitLinear&, const LowbitRows&, int64_t row, int64_t rows);
void lowbit_int8_neon(const LowbitLinear&, const LowbitRows&, const LinearTask&);
void lowbit_int8_neon_dotprod(const LowbitLinear&, const LowbitRows&, const LinearTask&);
void lowbit_int8_neon_i8mm(const LowbitLinear&, const LowbitRows&, const LinearTask&);

int lowbit_linear_cuda(const LowbitLinear&, void* stream);  // a cudaError_t
int64_t lowbit_linear_cuda_scratch(const LowbitLinear&);    // floats; reads the sizes

}  // namespace effinfer
