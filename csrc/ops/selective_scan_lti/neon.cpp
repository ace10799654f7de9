#include "ops/selective_scan_lti/generic.h"

void effinfer::selective_scan_lti_neon(const SelectiveScanLti& a, const ScanUnit& unit,
                                       float* scratch) {
  scan_unit(a, unit, scratch);
}
