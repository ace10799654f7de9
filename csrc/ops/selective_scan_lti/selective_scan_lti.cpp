#include "ops/selective_scan_lti/selective_scan_lti.h"

#include <algorithm>

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SelectiveScanLtiFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, selective_scan_lti_avx512},
    {"avx2", kAvx2, selective_scan_lti_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, selective_scan_lti_neon},
#endif
    {"scalar", kScalar, selective_scan_lti_scalar},
};

int64_t scratch_floats(const SelectiveScanLti& a) {
  // A, B, C and h of a unit; D; the tile's inputs and outputs, and a signal on its way to memory.
  const int64_t width = a.complex ? 2 : 1;
  return 4 * width * kScanUnit * a.state + kScanUnit + 3 * kScanTile * kScanUnit;
}

}  // namespace

const Kernel<SelectiveScanLtiFn>& selective_scan_lti_kernel() { return pick(kKernels); }

int64_t selective_scan_lti_scratch(const SelectiveScanLti& a) {
  return num_threads() * scratch_floats(a) * static_cast<int64_t>(sizeof(float));
}

void selective_scan_lti(const SelectiveScanLti& a) {
  const int64_t unit_channels = scan_unit_channels(a.sequences * a.dim);
  const int64_t per_sequence = (a.dim + unit_channels - 1) / unit_channels;
  const int64_t floats = scratch_floats(a);
  const auto run = selective_scan_lti_kernel().run;
  parallel_for(a.sequences * per_sequence, [&](int64_t chunk, int64_t worker) {
    const int64_t sequence = chunk / per_sequence, channel = chunk % per_sequence * unit_channels;
    const bool packed = a.cu_seqlens != nullptr;
    const ScanUnit unit = {
        .sequence = sequence,
        .batch = packed ? 0 : sequence,
        .begin = packed ? a.cu_seqlens[sequence] : 0,
        .end = packed ? a.cu_seqlens[sequence + 1] : a.length,
        .channel = channel,
        .channels = std::min(unit_channels, a.dim - channel),
    };
    run(a, unit, static_cast<float*>(a.scratch) + worker * floats);
  });
}

}  // namespace effinfer
