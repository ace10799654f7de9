#include "ops/causal_conv1d_update/generic.h"

void effinfer::causal_conv1d_update_avx2(const CausalConv1dUpdate& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
