// One decode step of selective_scan (Mamba-1, arXiv 2312.00752), the state updated in place.
//
//   d = softplus(dt + dt_bias)                               (softplus and bias optional)
//   h[n] = exp(d A[n]) h[n] + d x B[n]                       (per batch row and channel)
//   y = (D x + sum_n C[n] h[n]) * silu(z)                    (D and gate optional)
//
// Row b works on state slot state_indices[b] (b itself without indices); slot -1 is skipped and its
// row of y is 0. Two rows never share a slot. States lie in the vector lanes.
//
// The sum over n runs in the order of n, as selective_scan's: a step has the bits of a scan of one
// token, so that states may be advanced by either.
// Cost: one exp2, 3 fused multiply-adds and 2 multiplies per state element; bytes: the state read
// and written once, A once per row (from cache when it fits): D 1536, N 16 is 196 KB in L2, 16
// cycles per vector, 0.015 ms at 3.2 GHz: a floor, not reached.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct StepSignal {  // [batch, channel]; strides in elements
  void* data;        // null: absent
  int64_t batch, channel;
  DType type;
};

struct StepMatrix {  // [batch, group, state]
  const void* data;
  int64_t batch, group, state;
  DType type;
};

struct SelectiveStateUpdate {
  float* state;                                // [slots, dim, state_size], updated
  int64_t state_slot, state_channel, state_n;  // strides
  StepSignal x, dt, z, y;
  const float* A;  // [dim, state_size], dense
  StepMatrix B, C;
  const float* D;                // [dim] or null
  const float* dt_bias;          // [dim] or null
  const int32_t* state_indices;  // [batch] or null
  int64_t batch, dim, state_size, groups, slots;
  bool softplus;
};

// Channels [begin, end) of one batch row, all of one group, at most kStepUnit of them.
constexpr int64_t kStepUnit = 64;
using SelectiveStateUpdateFn = void (*)(const SelectiveStateUpdate&, int64_t row, int64_t begin,
                                        int64_t end);

const Kernel<SelectiveStateUpdateFn>& selective_state_update_kernel();
void selective_state_update(const SelectiveStateUpdate& args);

void selective_state_update_scalar(const SelectiveStateUpdate&, int64_t, int64_t, int64_t);
void selective_state_update_avx2(const SelectiveStateUpdate&, int64_t, int64_t, int64_t);
void selective_state_update_avx512(const SelectiveStateUpdate&, int64_t, int64_t, int64_t);
void selective_state_update_neon(const SelectiveStateUpdate&, int64_t, int64_t, int64_t);

int selective_state_update_cuda(const SelectiveStateUpdate&, void* stream);  // a cudaError_t

}  // namespace effinfer
