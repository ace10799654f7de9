#include "ops/lowbit_linear/avx512_int8.h"

void effinfer::lowbit_int8_avx512_vnni(const LowbitLinear& a, const LowbitRows& q,
                                       const LinearTask& t) {
  if (q.tables != nullptr) return lowbit_int8_avx2(a, q, t);  // sums are looked up there
  int8_any_format(a, q, t);
}
