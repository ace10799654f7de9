// One or a few steps of causal_conv1d, on states in place: the same sums in the same order, so the
// bits are those of the whole sequence at once.
//
//   for each of `length` positions t:  y[d,t] = act(bias[d] + sum_j weight[d,j] column(j))
//       column(width-1) = x[d,t], column(j) = state[slot, d, columns - (width-1-j) dilation]
//       state[slot, d] moves one column to the left and takes x[d,t] as its newest, last column
//
// A state keeps at least (width-1) dilation columns, often one more. Slot -1 skips the row: y = 0,
// no state is touched. No two rows may name one slot.
// Layout: any strides; channel stride 1 in x, y and dense columns or channels in the state are
// fast, width 4 with dense states of 4 columns the fastest: D 1536 in 5 us from cache, 9 from
// memory. Cost: 2 width flops an element; bytes: x, y and the weights once, the state read and
// written.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct CausalConv1dUpdate {
  const void* x;         // [batch, dim, length]
  void* state;           // [slots, dim, columns], read and written
  const float* weight;   // [dim, width], dense
  const float* bias;     // [dim] or null
  const int32_t* slots;  // [batch]: row b's state, -1 to skip; null for slot b
  void* y;               // [batch, dim, length]
  int64_t batch, dim, length, width, dilation, columns;
  int64_t pool;                                            // slots of state
  int64_t x_batch, x_dim, x_time, y_batch, y_dim, y_time;  // strides in elements
  int64_t state_slot, state_dim, state_column;
  DType type, state_type;  // of x and y; of state
  bool silu;
};

using CausalConv1dUpdateFn = void (*)(const CausalConv1dUpdate&, int64_t dim_begin,
                                      int64_t dim_end);

const Kernel<CausalConv1dUpdateFn>& causal_conv1d_update_kernel();
void causal_conv1d_update(const CausalConv1dUpdate& args);

void causal_conv1d_update_scalar(const CausalConv1dUpdate&, int64_t, int64_t);
void causal_conv1d_update_avx2(const CausalConv1dUpdate&, int64_t, int64_t);
void causal_conv1d_update_avx512(const CausalConv1dUpdate&, int64_t, int64_t);
void causal_conv1d_update_neon(const CausalConv1dUpdate&, int64_t, int64_t);

int causal_conv1d_update_cuda(const CausalConv1dUpdate&, void* stream);  // a cudaError_t

}  // namespace effinfer
