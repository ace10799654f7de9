#include "ops/silu_mul/generic.h"

void effinfer::silu_mul_avx2(const SiluMul& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
