#include "ops/moe_experts/generic.h"

void effinfer::moe_experts_avx512(const MoeExperts& a, MoePart part, int64_t begin, int64_t end) {
  dispatch(a, part, begin, end);
}
