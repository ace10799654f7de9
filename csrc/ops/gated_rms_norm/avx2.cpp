#include "ops/gated_rms_norm/generic.h"

void effinfer::gated_rms_norm_avx2(const GatedRmsNorm& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
