#include "ops/selective_scan/generic.h"

void effinfer::selective_scan_avx512(const SelectiveScan& a, const ScanUnit& unit, float* scratch) {
  scan_unit(a, unit, scratch);
}
