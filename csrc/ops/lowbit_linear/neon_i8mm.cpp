#include "ops/lowbit_linear/neon_int8.h"

void effinfer::lowbit_int8_neon_i8mm(const LowbitLinear& a, const LowbitRows& q,
                                     const LinearTask& t) {
  int8_any_format(a, q, t);
}
