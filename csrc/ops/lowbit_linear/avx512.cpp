#include "ops/lowbit_linear/generic.h"

void effinfer::lowbit_float_avx512(const LowbitLinear& a, const LinearTask& t) { float_task(a, t); }
