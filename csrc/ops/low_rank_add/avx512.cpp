#include "ops/low_rank_add/generic.h"

void effinfer::low_rank_add_avx512(const LowRankAdd& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
