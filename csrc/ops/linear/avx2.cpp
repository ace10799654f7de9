#include "ops/linear/generic.h"

void effinfer::linear_avx2(const Linear& a, const LinearTask& t) { dispatch(a, t); }
