#include "ops/binary_linear/generic.h"
#include "ops/binary_linear/lookup.h"

void effinfer::binary_signs_avx2(const SignRows& a) { signs(a); }
void effinfer::binary_count_avx2(const CountTask& t) { count_group(t); }
void effinfer::binary_finish_avx2(const FinishTask& t) { finish_counts(t); }
