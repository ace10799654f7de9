#include "ops/low_rank_add/generic.h"

void effinfer::low_rank_add_neon(const LowRankAdd& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
