// Selective scan of Mamba-1, S6 (arXiv 2312.00752), with states in and out.
//
//   d_t = softplus(delta_t + delta_bias)                     (softplus and bias optional)
//   h_t[n] = exp(d_t A[n]) h_{t-1}[n] + d_t u_t B_t[n]       (per channel, n < state)
//   y_t = (D u_t + sum_n C_t[n] h_t[n]) * silu(z_t)          (D and gate optional)
//
// u, delta, z, y are [batch, dim, length] with any strides; channel stride 1 (time-major memory) is
// the fast path, time stride 1 costs a transpose in L1. B and C are one of: constant [dim, state],
// per position [batch, state, length], or grouped [batch, groups, state, length].
// With cu_seqlens the one batch row is `sequences` sequences packed along time, each with its own
// initial and last state. A masked position is passed over: h is untouched there and y is 0.
// Reverse walks time downwards; "last" is then the state after position 0.
// Snapshot k is the state after all but the last k tokens walked, 0 <= k < num_snapshots; the
// initial state where the sequence has no more than k tokens.
//
// The sum over n runs upwards from D u_t, in float32; neither tiles, neighbours nor threads change
// it. Largest error: 2 ulp in exp; see effinfer/ops/selective_scan.py for the bound on y.
// Cost per (position, channel, n): one exp2, 3 fused multiply-adds and 2 multiplies, 14 operations
// of which 9 need an FMA port: 4.5 cycles per vector where there are two (Zen 3, D 1536, N 16,
// L 512, 3.2 GHz: 2.2 ms, and 0.6 ms for softplus and gate). Bytes: u, delta, z, y once, B and C
// once per unit. That is a floor: such a mix of independent instructions takes 4.8 cycles there,
// this loop 6.2; softplus and the inputs take 0.9 ms (1.2 with delta channel-major), the gate and
// the outputs 0.55. bench/results/ops_scan.json has the whole.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct ScanSignal {  // [batch, channel, time]; strides in elements
  void* data;        // null: absent
  int64_t batch, channel, time;
  DType type;
};

struct ScanMatrix {  // [batch, group, state, time]; a constant [dim, state] has a group per channel
  const void* data;
  int64_t batch, group, state, time;  // strides in elements; 0 along batch and time when constant
  int64_t groups;
  DType type;
  bool constant;
};

struct SelectiveScan {
  ScanSignal u, delta, z, y;
  const float* A;  // [dim, state]
  ScanMatrix B, C;
  const float* D;              // [dim] or null
  const float* delta_bias;     // [dim] or null
  const float* initial_state;  // [sequences, dim, state] or null for zeros
  const int32_t* cu_seqlens;   // [sequences + 1], or null: every batch row is one sequence
  const uint8_t* mask;         // [batch, length], 0 = masked, or null
  int64_t mask_batch, mask_time;
  float* last_state;  // [sequences, dim, state]
  float* snapshots;   // [sequences, num_snapshots, dim, state]
  int64_t batch, dim, length, state, sequences, num_snapshots;
  bool softplus, reverse;
  // selective_scan_scratch(args) bytes; on CUDA selective_scan_cuda_scratch(args) floats, or null:
  // then a long sequence of few channels keeps few multiprocessors busy.
  void* scratch;
};

// A piece of work: at most kScanUnit channels, all of one group, of one sequence.
constexpr int64_t kScanUnit = 128;
constexpr int64_t kScanTile = 32;  // positions converted and kept in L1 at a time
struct ScanUnit {
  int64_t sequence, batch, begin, end;  // positions [begin, end) of that batch row
  int64_t channel, channels;
};

using SelectiveScanFn = void (*)(const SelectiveScan&, const ScanUnit&, float* scratch);

const Kernel<SelectiveScanFn>& selective_scan_kernel();
int64_t selective_scan_scratch(const SelectiveScan& args);
int64_t scan_unit_channels(int64_t channels);  // of a unit, where all sequences have so many
void selective_scan(const SelectiveScan& args);

void selective_scan_scalar(const SelectiveScan&, const ScanUnit&, float*);
void selective_scan_avx2(const SelectiveScan&, const ScanUnit&, float*);
void selective_scan_avx512(const SelectiveScan&, const ScanUnit&, float*);
void selective_scan_neon(const SelectiveScan&, const ScanUnit&, float*);

int64_t selective_scan_cuda_scratch(const SelectiveScan& args);  // floats
int selective_scan_cuda(const SelectiveScan&, void* stream);     // a cudaError_t

}  // namespace effinfer
