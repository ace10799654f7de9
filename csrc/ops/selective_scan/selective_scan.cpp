#include "ops/selective_scan/selective_scan.h"

#include <algorithm>

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SelectiveScanFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, selective_scan_avx512},
    {"avx2", kAvx2, selective_scan_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, selective_scan_neon},
#endif
    {"scalar", kScalar, selective_scan_scalar},
};

// Channels that share their rows of B and C; a unit never leaves its group.
int64_t group_channels(const SelectiveScan& a) {
  const int64_t groups = std::max(a.B.constant ? 1 : a.B.groups, a.C.constant ? 1 : a.C.groups);
  return a.dim / groups;
}

int64_t scratch_floats(const SelectiveScan& a) {
  // The unit's A, h and constant B and C; B and C at the tile's positions (16: a vector's
  // overhang); D, bias, largest steps and |A|; steps, inputs, outputs and two signals of the tile.
  return 4 * kScanUnit * a.state + 2 * (kScanTile * a.state + 16) + 4 * kScanUnit +
         5 * kScanTile * kScanUnit;
}

}  // namespace

const Kernel<SelectiveScanFn>& selective_scan_kernel() { return pick(kKernels); }

// Wide units read longer rows, narrow ones give every thread its share.
int64_t scan_unit_channels(int64_t channels) {
  return channels >= 2 * num_threads() * kScanUnit ? kScanUnit : kScanUnit / 2;
}

int64_t selective_scan_scratch(const SelectiveScan& a) {
  return num_threads() * scratch_floats(a) * static_cast<int64_t>(sizeof(float));
}

void selective_scan(const SelectiveScan& a) {
  if (a.dim == 0 || a.sequences == 0) return;
  const int64_t group = group_channels(a), width = scan_unit_channels(a.sequences * a.dim);
  const int64_t per_group = (group + width - 1) / width;
  const int64_t per_sequence = a.dim / group * per_group;
  const int64_t floats = scratch_floats(a);
  const auto run = selective_scan_kernel().run;
  parallel_for(a.sequences * per_sequence, [&](int64_t chunk, int64_t worker) {
    const int64_t sequence = chunk / per_sequence, part = chunk % per_sequence;
    const int64_t offset = part % per_group * width;
    const bool packed = a.cu_seqlens != nullptr;
    const ScanUnit unit = {
        .sequence = sequence,
        .batch = packed ? 0 : sequence,
        .begin = packed ? a.cu_seqlens[sequence] : 0,
        .end = packed ? a.cu_seqlens[sequence + 1] : a.length,
        .channel = part / per_group * group + offset,
        .channels = std::min(width, group - offset),
    };
    run(a, unit, static_cast<float*>(a.scratch) + worker * floats);
  });
}

}  // namespace effinfer
