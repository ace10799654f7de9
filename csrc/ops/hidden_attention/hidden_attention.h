// The attention matrix hidden in a Mamba-1 scan (arXiv 2403.01590), for looking at a model.
//
//   alpha[i][j] = sum_n C_i[n] (prod_{j < k <= i} exp(d_k A[n])) d_j B_j[n]   (j <= i, else 0)
//
// per channel, with d = softplus(delta + delta_bias): the scan's output without D and gate is
// y_i = sum_j alpha[i][j] u_j. delta, B and C are as in selective_scan.
//
// Column j is the scan of an input that is 1 at j: the products are taken step by step, the sum
// over n runs upwards, in float32; neither the batch nor the threads change a bit.
// Cost per (channel, i, j <= i, n): a product and an FMA; exp only per (channel, i, n). Bytes:
// alpha once. A debug op: it is quadratic in the length, and its states go through L1.
#pragma once
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {

struct HiddenAttention {
  ScanSignal delta;
  const float* A;  // [dim, state]
  ScanMatrix B, C;
  const float* delta_bias;  // [dim] or null
  float* alpha;             // [batch, dim, length, length]
  int64_t batch, dim, length, state;
  bool softplus;
  void* scratch;  // hidden_attention_scratch(args) bytes; not used on CUDA
};

// One channel of one batch row: row = batch * dim + channel.
using HiddenAttentionFn = void (*)(const HiddenAttention&, int64_t row, float* scratch);

const Kernel<HiddenAttentionFn>& hidden_attention_kernel();
int64_t hidden_attention_scratch(const HiddenAttention& args);
void hidden_attention(const HiddenAttention& args);

void hidden_attention_scalar(const HiddenAttention&, int64_t, float*);
void hidden_attention_avx2(const HiddenAttention&, int64_t, float*);
void hidden_attention_avx512(const HiddenAttention&, int64_t, float*);
void hidden_attention_neon(const HiddenAttention&, int64_t, float*);

int hidden_attention_cuda(const HiddenAttention&, void* stream);  // a cudaError_t

}  // namespace effinfer
