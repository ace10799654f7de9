#include "ops/softmax_top2/generic.h"

void effinfer::softmax_top2_neon(const SoftmaxTop2& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
