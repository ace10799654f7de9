#include "ops/linear/generic.h"

void effinfer::linear_neon(const Linear& a, const LinearTask& t) { dispatch(a, t); }
