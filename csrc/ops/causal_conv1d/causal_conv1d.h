// Causal depthwise convolution over time, dilated, with a carried tail (Mamba, arXiv 2312.00752;
// MultiresConv, arXiv 2305.01638).
//
//   y[d,t] = act(bias[d] + sum_j weight[d,j] x[d, t - (width-1-j) dilation])      act: none or silu
//
// Let past = (width-1) dilation. x before the sequence is initial_state (its `past` columns, newest
// last) or zero. The state after n tokens is the last `past` columns of [initial_state | x[:n]];
// states[k] is the one k tokens before the end, k = 0 the final one, and the initial state where
// the sequence is shorter than k. A position whose mask is 0 counts as x = 0 and gets y = 0, as
// transformers zeroes hidden states before and after the convolution.
//
// The sum is taken in float32 from the bias on, oldest tap first, so that a split anywhere, another
// layout or another thread count give the same bits.
// Layout: any strides. float32 with channel stride 1 (time-major) or time stride 1 in both x and y
// goes straight from memory to memory; everything else through blocks in L1.
// Cost: 2 width flops an element (and one exp for silu); bytes: x and y once. For 8 floats on one
// 3.2 GHz AVX2 core that copies 16 GB/s from memory, the copy takes 13 cycles, silu 7, the taps
// width / 2: float32 from memory is held by the copy, from cache by silu and wide filters. 16-bit
// types halve the copy (6 cycles), not the arithmetic, and round in 3 more: held by arithmetic.
// Where neither stride is 1, gathering 8 elements takes 6 cycles and scattering them 11, and memory
// moves whole lines, whatever part of them is x.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct CausalConv1d {
  const void* x;               // [batch, dim, length]
  const float* weight;         // [dim, width], dense
  const float* bias;           // [dim] or null
  const float* initial_state;  // [sequences, dim, past] or null
  const int32_t* cu_seqlens;   // [sequences + 1] or null; when given, batch is 1
  const uint8_t* mask;         // [batch, length] or null
  void* y;                     // [batch, dim, length]
  float* states;               // [sequences, num_states, dim, past], dense
  int64_t sequences;           // = batch without cu_seqlens
  int64_t dim, length, width, dilation, num_states;
  int64_t x_batch, x_dim, x_time, y_batch, y_dim, y_time;  // strides in elements
  int64_t initial_sequence, initial_dim, initial_column;
  int64_t mask_batch, mask_time;
  DType type;  // of x and y
  bool silu;
};

// A part of the work: channels [dim_begin, dim_end) and times [begin, end) of one sequence. The
// part that ends a sequence writes its states.
struct CausalConv1dPart {
  int64_t sequence, dim_begin, dim_end, begin, end;
};

using CausalConv1dFn = void (*)(const CausalConv1d&, const CausalConv1dPart&);

const Kernel<CausalConv1dFn>& causal_conv1d_kernel();
void causal_conv1d(const CausalConv1d& args);

void causal_conv1d_scalar(const CausalConv1d&, const CausalConv1dPart&);
void causal_conv1d_avx2(const CausalConv1d&, const CausalConv1dPart&);
void causal_conv1d_avx512(const CausalConv1d&, const CausalConv1dPart&);
void causal_conv1d_neon(const CausalConv1d&, const CausalConv1dPart&);

int causal_conv1d_cuda(const CausalConv1d&, void* stream);  // a cudaError_t

}  // namespace effinfer
