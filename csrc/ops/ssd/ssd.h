// The Mamba-2 scan (state space duality, arXiv 2405.21060): a matrix state per head, one decay
// each.
//
//   d_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)     (softplus only if asked for)
//   S_t = exp(d_t A) S_{t-1} + d_t x_t (outer) B_t            [P, N] per head
//   y_t = (S_t C_t + D x_t) * silu(z_t)                       (D, z optional)
//
// A sequence is a batch row, or with cu_seqlens a range of row 0. With seq_idx the state restarts
// at zero wherever the id changes inside a row; the last state is then that of the row's last id.
// Positions whose mask is 0 are not tokens: nothing there is read but the mask, and y is 0; the
// result for the others is bit for bit that of the sequence without them.
//
// A sequence's tokens are cut into chunks of kSsdChunk counted from its start. The state after a
// token is one function of the state at its chunk's start and the tokens since, whatever follows:
// so a snapshot has the bits of a run that ends there. Fewer than kSsdShort tokens, or all of them
// when asked to, are taken one by one (step.h), with the bits of ssd_state_update; more as three
// matrix products on 6x16 tiles (generic.h), with G = C B^T shared by the heads of a group and
// decays multiplied, never divided:
//   Y = (G o L) (d x) + pre o (C S^T),    S' = pre_q S + (post o d x)^T B
// Every sum runs in one fixed order, so neither the batch nor the threads change a bit.
//
// Cost per token and head: 4 P N flops + P * kSsdChunk; bytes: x, y, z once, B and C once per block
// of heads; states of a block stay in cache. 24 heads of P 64, N 128 over 512 tokens from zero:
// 432 MFLOP, tiles' padding included, 4.2 ms at 103 GFLOP/s. Measured on AVX2: 5.0 ms from warm
// caches, 4.3 of them in the tiles.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

constexpr int64_t kSsdChunk = 48;
constexpr int64_t kSsdShort = 8;

struct Ssd {
  const void* x;               // [batch, length, heads, P]
  const void* dt;              // [batch, length, heads]
  const float* A;              // [heads]
  const void* B;               // [batch, length, groups, N]
  const void* C;               // [batch, length, groups, N]
  const float* D;              // [heads, P] by strides, or null
  const void* z;               // like x, or null
  const float* dt_bias;        // [heads] or null
  const float* initial_state;  // [sequences, heads, P, N], dense, or null for zeros
  const int32_t* cu_seqlens;   // [sequences + 1], or null: a sequence is a batch row
  const int32_t* seq_idx;      // [batch, length], or null
  const uint8_t* mask;         // [batch, length], or null
  void* y;                     // like x
  float* last_state;           // [sequences, heads, P, N], dense
  float* snapshots;  // [sequences, snapshot_count, heads, P, N], dense: after the last token, the
                     // one before, ...; the initial state where the sequence is shorter
  int64_t batch, length, heads, head_dim, groups, state_dim, sequences, snapshot_count;
  // In elements: batch, time, head, P.
  int64_t x_strides[4] = {}, z_strides[4] = {}, y_strides[4] = {};
  int64_t dt_strides[3] = {};                             // batch, time, head
  int64_t B_strides[4] = {}, C_strides[4] = {};           // batch, time, group, N
  int64_t D_strides[2] = {};                              // head, P
  int64_t seq_idx_strides[2] = {}, mask_strides[2] = {};  // batch, time
  int64_t A_stride, dt_bias_stride;
  DType x_type, dt_type, B_type;  // z and y have x's type, C has B's
  float dt_min, dt_max;
  bool dt_softplus;
  bool one_by_one;  // with the bits of steps, so that they do not depend on where a run begins
  // CPU kernels only: how many threads may work, and ssd_scratch(args) floats, 64-byte aligned.
  int64_t slots;
  float* scratch = nullptr;
};

// Heads [head_begin, head_end) of one group, for one sequence; `scratch` is the slot's own.
using SsdFn = void (*)(const Ssd&, int64_t sequence, int64_t head_begin, int64_t head_end,
                       float* scratch);

const Kernel<SsdFn>& ssd_kernel();
int64_t ssd_scratch(const Ssd& args);  // reads the sizes and slots
void ssd(const Ssd& args);

void ssd_scalar(const Ssd&, int64_t, int64_t, int64_t, float*);
void ssd_avx2(const Ssd&, int64_t, int64_t, int64_t, float*);
void ssd_avx512(const Ssd&, int64_t, int64_t, int64_t, float*);
void ssd_neon(const Ssd&, int64_t, int64_t, int64_t, float*);

int ssd_cuda(const Ssd&, void* stream);  // a cudaError_t

}  // namespace effinfer
