#include "ops/selective_scan_lmu/selective_scan_lmu.h"

#include <algorithm>

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SelectiveScanLmuFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, selective_scan_lmu_avx512},
    {"avx2", kAvx2, selective_scan_lmu_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, selective_scan_lmu_neon},
#endif
    {"scalar", kScalar, selective_scan_lmu_scalar},
};

int64_t scratch_floats(const SelectiveScanLmu& a) {
  // A row's memory and inputs, before and after a step; 16: the overhang of a vector of inputs.
  return 2 * kLmuRows * (a.panels() * kLmuPanel + a.chunk + 16);
}

}  // namespace

const Kernel<SelectiveScanLmuFn>& selective_scan_lmu_kernel() { return pick(kKernels); }

int64_t selective_scan_lmu_scratch(const SelectiveScanLmu& a) {
  return num_threads() * scratch_floats(a) * static_cast<int64_t>(sizeof(float));
}

void selective_scan_lmu(const SelectiveScanLmu& a) {
  const auto run = selective_scan_lmu_kernel().run;
  const int64_t rows = a.batch * a.dim, floats = scratch_floats(a);
  parallel_for((rows + kLmuRows - 1) / kLmuRows, [&](int64_t block, int64_t worker) {
    const int64_t begin = block * kLmuRows;
    run(a, begin, std::min(begin + kLmuRows, rows),
        static_cast<float*>(a.scratch) + worker * floats);
  });
}

}  // namespace effinfer
