// What lowbit_linear's tensor-core kernels are given, how they cut k, and what is made of x before
// they run: int8 codes, and sums of x for zeros and offsets.
//
// k is walked in steps of 16, the k of one tensor-core product. A segment is as much of one group
// as is summed in one accumulator: a group, or a piece of a long one.
#pragma once
#include "base/gpu.h"
#include "ops/lowbit_linear/cuda_quads.h"

namespace effinfer::lowbit {
namespace {

constexpr int kStep = 16;

struct Segment {
  int64_t group;
  int begin, end;
};

struct Problem {
  LowbitLinear args;
  int64_t panels;
  int units;             // of a panel
  int k_end;             // k, rounded up to whole steps (whole units of ternary_dense)
  int group, piece;      // k in each, at most k_end
  int pieces, segments;  // of a group, and in all
  bool aligned;          // x can be read 16 bytes at a time
  // In the scratch. A section of x is what one of its sums is over: a segment, or with int8
  // activations a group.
  int8_t* codes;   // [rows, k_end]
  float* x_scale;  // [rows]
  void* sums;      // [sections, rows], int32 of codes, else float32; null if not needed

  __device__ Segment segment(int s) const {
    const int64_t g = s / pieces;
    const int64_t begin = g * group + s % pieces * int64_t{piece};
    int64_t end = begin + piece;
    if (end > (g + 1) * group) end = (g + 1) * group;
    if (end > k_end) end = k_end;
    return {g, static_cast<int>(begin < end ? begin : end), static_cast<int>(end)};
  }
};

inline bool takes_sums(const LowbitLinear& a) {
  return a.int8_activations || a.weight.offset != nullptr;
}

inline int sections(const Problem& p) {
  return p.args.int8_activations ? p.segments / p.pieces : p.segments;
}

// The cut of k, from the sizes; nothing in the scratch yet.
inline Problem cut(const LowbitLinear& a) {
  const Layout l = layout(a.weight.format);
  const bool dense = a.weight.format == LowbitFormat::ternary_dense;
  Problem p = {};
  p.args = a;
  p.panels = linear_layout::panels(a.io);
  p.units = static_cast<int>(ceil_div(a.io.k, l.unit_k));
  p.k_end = dense ? p.units * l.unit_k : static_cast<int>(ceil_div(a.io.k, kStep)) * kStep;
  p.group = a.weight.group < a.io.k ? static_cast<int>(a.weight.group) : p.k_end;
  p.piece = dense ? 144 : 128;
  if (p.group < p.piece) p.piece = p.group;
  p.pieces = 1;
  if (a.io.k == 0) {  // no group, and no zero of one
    p.args.weight.zero = nullptr;
    return p;
  }
  p.pieces = static_cast<int>(ceil_div(p.group, p.piece));
  p.segments = p.pieces * static_cast<int>(ceil_div(p.k_end, p.group));
  return p;
}

// Where things lie in the scratch; returns its size in floats.
inline int64_t place(Problem& p, float* scratch) {
  const int64_t rows = p.args.io.rows;
  int64_t floats = 0;
  p.codes = reinterpret_cast<int8_t*>(scratch);
  if (p.args.int8_activations) floats += rows * p.k_end / 4;
  p.x_scale = scratch + floats;
  if (p.args.int8_activations) floats += rows;
  if (takes_sums(p.args)) {
    p.sums = scratch + floats;
    floats += rows * sections(p);
  }
  return floats;
}

constexpr int kPrepareThreads = 256, kPrepareWarps = kPrepareThreads / gpu::kWarp;

// The largest bit pattern of |x| in a row: that of a NaN, where there is one.
__device__ inline uint32_t largest(const Linear& a, int64_t row, uint32_t* of_warp) {
  uint32_t most = 0;
  const auto raise = [&](uint32_t bits) { most = bits > most ? bits : most; };
  for (int64_t k = threadIdx.x; k < a.k; k += kPrepareThreads)
    raise(gpu::float_to_bits(gpu::load_any(a.x, a.x_type, row * a.x_stride + k)) & 0x7fffffffu);
  for (int m = gpu::kWarp / 2; m > 0; m /= 2)
    raise(gpu::float_to_bits(gpu::shuffle_xor(gpu::bits_to_float(most), m)));
  if (gpu::lane() == 0) of_warp[gpu::warp()] = most;
  gpu::sync_block();
  for (int w = 0; w < kPrepareWarps; ++w) raise(of_warp[w]);
  return most;
}

// A block per row: its codes and scale as the contract has them, or the caller's.
__device__ inline void quantize(const Problem& p, int64_t row, uint32_t* of_warp) {
  const Linear& a = p.args.io;
  float scale = 0.f, inverse = 0.f;
  if (p.args.x_scale != nullptr) {
    scale = p.args.x_scale[row];
  } else {
    const uint32_t bits = largest(a, row, of_warp);
    constexpr uint32_t kInfinity = 0x7f800000u;
    const float absmax = gpu::bits_to_float(bits), inverse_or_inf = 127.f / absmax;
    if (bits >= kInfinity) {
      scale = absmax - absmax;  // NaN
    } else if (gpu::float_to_bits(inverse_or_inf) < kInfinity) {
      scale = absmax / 127.f;
      inverse = inverse_or_inf;
    }
  }
  if (threadIdx.x == 0) p.x_scale[row] = scale;
  for (int64_t k = threadIdx.x; k < p.k_end; k += kPrepareThreads) {
    int8_t code = 0;
    if (k < a.k) {
      const int64_t at = row * a.x_stride + k;
      if (p.args.x_scale != nullptr)
        code = static_cast<const int8_t*>(a.x)[at];
      else if (inverse != 0.f)
        code = static_cast<int8_t>(rintf(gpu::mul(gpu::load_any(a.x, a.x_type, at), inverse)));
    }
    p.codes[row * p.k_end + k] = code;
  }
}

// What a row needs before the products: a block each.
__global__ void __launch_bounds__(kPrepareThreads) prepare(Problem p) {
  const Linear& a = p.args.io;
  const int64_t row = blockIdx.x;
  const bool codes = p.args.int8_activations;
  if (codes) quantize(p, row, gpu::shared<uint32_t>());
  gpu::sync_block();
  const int count = codes ? p.segments / p.pieces : p.segments;
  for (int s = gpu::warp(); s < count; s += kPrepareWarps) {
    Segment at = p.segment(codes ? s * p.pieces : s);
    if (codes) {
      const int64_t end = int64_t{at.begin} + p.group;
      at.end = static_cast<int>(end < p.k_end ? end : p.k_end);
    }
    const int64_t end = at.end < a.k ? at.end : a.k;
    float sum = 0.f;  // exact of codes: 65536 of them at most
    for (int64_t k = at.begin + gpu::lane(); k < end; k += gpu::kWarp)
      sum += codes ? static_cast<float>(p.codes[row * p.k_end + k])
                   : gpu::load_any(a.x, a.x_type, row * a.x_stride + k);
    sum = gpu::warp_sum(sum);
    if (gpu::lane() != 0) continue;
    const int64_t place = s * a.rows + row;
    if (codes)
      static_cast<int32_t*>(p.sums)[place] = static_cast<int32_t>(sum);
    else
      static_cast<float*>(p.sums)[place] = sum;
  }
}

}  // namespace
}  // namespace effinfer::lowbit
