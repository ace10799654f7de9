// Scan of a Legendre memory unit (Voelker, Kajic, Eliasmith, NeurIPS 2019): a fixed dense
// transition, the same for all channels.
//
//   m_t = A m_{t-1} + b u_t        (per channel; m has `state` numbers)
//
// A step takes `chunk` positions at once: m <- transition^T [m; u_t .. u_{t + chunk - 1}], where
// transition, [state + chunk, state], is A^T over b^T for chunk 1, and for more the powers
// (A^chunk)^T, (A^{chunk-1} b)^T .. b^T. That skips the memories between: state / chunk + 1 times
// `state` FMAs a position instead of state + 1 times. It comes in panels of kLmuPanel columns,
// [panel][state + chunk][kLmuPanel], the last one filled with zeros.
//
// u is [batch, dim, length] with any strides, all else is contiguous. The memory looks back only:
// there is no reverse. Snapshot k is the memory after all but the last k positions, the initial one
// where there are no more than k.
//
// Each number is one sum, over m upwards, then u upwards, in float32; neither the other channels
// nor the threads change it. Bound by the FMA ports (Zen 3, L 784, D 24, N 256, 3.2 GHz: 24 ms, of
// which the kernel reaches 85 %); a lone channel, by reading the transition.
// Bytes: the transition once a step and six channels, from L2; u and the memories once.
#pragma once
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {

constexpr int64_t kLmuPanel = 16;

struct SelectiveScanLmu {
  ScanSignal u;
  const float* transition;     // [panels, state + chunk, kLmuPanel]
  const float* initial_state;  // [batch, dim, state] or null for zeros
  void* memories;              // [batch, dim, length, state] of u's type, or null; chunk 1 only
  float* last_state;           // [batch, dim, state]
  float* snapshots;            // [batch, num_snapshots, dim, state]; chunk 1 only
  int64_t batch, dim, length, state, chunk, num_snapshots;  // chunk divides length
  void* scratch;  // selective_scan_lmu_scratch(args) bytes; not used on CUDA

  constexpr int64_t inner() const { return state + chunk; }
  constexpr int64_t panels() const { return (state + kLmuPanel - 1) / kLmuPanel; }
};

// Rows [begin, end), at most kLmuRows, of the batch * dim there are.
constexpr int64_t kLmuRows = 6;
using SelectiveScanLmuFn = void (*)(const SelectiveScanLmu&, int64_t begin, int64_t end,
                                    float* scratch);

const Kernel<SelectiveScanLmuFn>& selective_scan_lmu_kernel();
int64_t selective_scan_lmu_scratch(const SelectiveScanLmu& args);
void selective_scan_lmu(const SelectiveScanLmu& args);

void selective_scan_lmu_scalar(const SelectiveScanLmu&, int64_t, int64_t, float*);
void selective_scan_lmu_avx2(const SelectiveScanLmu&, int64_t, int64_t, float*);
void selective_scan_lmu_avx512(const SelectiveScanLmu&, int64_t, int64_t, float*);
void selective_scan_lmu_neon(const SelectiveScanLmu&, int64_t, int64_t, float*);

int selective_scan_lmu_cuda(const SelectiveScanLmu&, void* stream);  // a cudaError_t

}  // namespace effinfer
