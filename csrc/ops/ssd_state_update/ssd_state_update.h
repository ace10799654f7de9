// One decode step of the Mamba-2 scan (see ops/ssd/ssd.h), in place in a pool of states.
//
//   d = clamp(softplus(dt + dt_bias), dt_min, dt_max)      per head, or per head and P
//   S = exp(d A) S + d x (outer) B                         A per head, or per element of S
//   y = (S C + D x) * silu(z)
//
// Row b uses slot state_indices[b] (b itself without indices); slot -1 leaves every state alone and
// makes that row of y 0. Slots must not repeat.
// Cost per row and head: 5 P N flops; bytes: the state once in and once out, which is the floor. On
// AVX2 60 GB/s of it from cache and 29 from memory, where changing floats in place without anything
// else reaches 36.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct SsdStateUpdate {
  float* state;                  // [slots, heads, P, N]
  const void* x;                 // [batch, heads, P]
  const void* dt;                // [batch, heads, P], P stride 0 when dt is per head
  const float* A;                // [heads, P, N], strides 0 when A is per head
  const void* B;                 // [batch, groups, N]
  const void* C;                 // [batch, groups, N]
  const float* D;                // [heads, P] by strides, or null
  const void* z;                 // like x, or null
  const float* dt_bias;          // [heads, P] by strides, or null
  const int32_t* state_indices;  // [batch], dense, or null
  void* y;                       // like x
  int64_t batch, heads, head_dim, groups, state_dim, slots;
  int64_t state_strides[4];                  // elements: slot, head, P, N
  int64_t x_strides[3], z_strides[3];        // batch, head, P
  int64_t y_strides[3];                      // batch, head, P
  int64_t dt_strides[3];                     // batch, head, P
  int64_t A_strides[3];                      // head, P, N
  int64_t B_strides[3], C_strides[3];        // batch, group, N
  int64_t D_strides[2], dt_bias_strides[2];  // head, P
  DType x_type, dt_type, B_type;             // z and y have x's type, C has B's
  float dt_min, dt_max;
  bool dt_softplus;
};

// Heads [head_begin, head_end) of batch row `row`.
using SsdStateUpdateFn = void (*)(const SsdStateUpdate&, int64_t row, int64_t head_begin,
                                  int64_t head_end);

const Kernel<SsdStateUpdateFn>& ssd_state_update_kernel();
void ssd_state_update(const SsdStateUpdate& args);

void ssd_state_update_scalar(const SsdStateUpdate&, int64_t, int64_t, int64_t);
void ssd_state_update_avx2(const SsdStateUpdate&, int64_t, int64_t, int64_t);
void ssd_state_update_avx512(const SsdStateUpdate&, int64_t, int64_t, int64_t);
void ssd_state_update_neon(const SsdStateUpdate&, int64_t, int64_t, int64_t);

int ssd_state_update_cuda(const SsdStateUpdate&, void* stream);  // a cudaError_t

}  // namespace effinfer
