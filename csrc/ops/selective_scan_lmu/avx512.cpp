#include "ops/selective_scan_lmu/generic.h"

void effinfer::selective_scan_lmu_avx512(const SelectiveScanLmu& a, int64_t begin, int64_t end,
                                         float* scratch) {
  scan_rows(a, begin, end, scratch);
}
