#include "ops/selective_scan_lti/generic.h"

void effinfer::selective_scan_lti_avx2(const SelectiveScanLti& a, const ScanUnit& unit,
                                       float* scratch) {
  scan_unit(a, unit, scratch);
}
