#include "ops/rms_norm/generic.h"

void effinfer::rms_norm_avx512(const RmsNorm& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
