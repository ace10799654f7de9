#include "ops/selective_scan/generic.h"

void effinfer::selective_scan_neon(const SelectiveScan& a, const ScanUnit& unit, float* scratch) {
  scan_unit(a, unit, scratch);
}
