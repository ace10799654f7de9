#include "ops/rms_norm/generic.h"

void effinfer::rms_norm_neon(const RmsNorm& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
