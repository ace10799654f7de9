#include "ops/binary_linear/generic.h"
#include "ops/binary_linear/lookup.h"

void effinfer::binary_signs_avx512(const SignRows& a) { signs(a); }
void effinfer::binary_count_avx512(const CountTask& t) { count_group(t); }
void effinfer::binary_finish_avx512(const FinishTask& t) { finish_counts(t); }
