// Time-invariant scan: a diagonal recurrence whose coefficients are constant, real or complex
// (S4D, arXiv 2206.11893; the inner scan of S5, arXiv 2208.04933).
//
//   h_t[n] = A[n] h_{t-1}[n] + B[n] u_t       (per channel, n < state)
//   y_t = D u_t + sum_n Re(C[n] h_t[n])       (D optional)
//
// A, B and C are already discretised. Signals, sequences, masks, direction and snapshots are those
// of selective_scan (ops/selective_scan/selective_scan.h). A complex number is two floats, (re,
// im), in coefficients and states alike.
//
// The sum over n runs upwards from D u_t, real part before imaginary part, in float32; neither
// tiles, neighbours nor threads change it.
// Cost per (position, channel, n): 8 FMA-port operations complex (2 for the input, 4 for h, 2 for
// y), 3 real: 4 and 1.5 cycles per vector where there are two ports (Zen 3, D 768, N 32 complex,
// L 512, 3.2 GHz: 2.0 ms, a floor; the kernel reaches 80 % of it). Bytes: u and y once, the
// coefficients once per tile of positions, from L2. Two n would fill the sixteen registers of AVX2,
// but wait for each other's two FMAs in a row; four, with most coefficients from L1, do not.
#pragma once
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {

struct SelectiveScanLti {
  ScanSignal u, y;
  const float *A, *B, *C;      // [dim, state]
  const float* D;              // [dim] or null
  const float* initial_state;  // [sequences, dim, state] or null for zeros
  const int32_t* cu_seqlens;   // [sequences + 1], or null: every batch row is one sequence
  const uint8_t* mask;         // [batch, length], 0 = masked, or null
  int64_t mask_batch, mask_time;
  float* last_state;  // [sequences, dim, state]
  float* snapshots;   // [sequences, num_snapshots, dim, state]
  int64_t batch, dim, length, state, sequences, num_snapshots;
  bool complex, reverse;
  void* scratch;  // selective_scan_lti_scratch(args) bytes; not used on CUDA
};

using SelectiveScanLtiFn = void (*)(const SelectiveScanLti&, const ScanUnit&, float* scratch);

const Kernel<SelectiveScanLtiFn>& selective_scan_lti_kernel();
int64_t selective_scan_lti_scratch(const SelectiveScanLti& args);
void selective_scan_lti(const SelectiveScanLti& args);

void selective_scan_lti_scalar(const SelectiveScanLti&, const ScanUnit&, float*);
void selective_scan_lti_avx2(const SelectiveScanLti&, const ScanUnit&, float*);
void selective_scan_lti_avx512(const SelectiveScanLti&, const ScanUnit&, float*);
void selective_scan_lti_neon(const SelectiveScanLti&, const ScanUnit&, float*);

int selective_scan_lti_cuda(const SelectiveScanLti&, void* stream);  // a cudaError_t

}  // namespace effinfer
