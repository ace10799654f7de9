#include "ops/causal_conv1d/generic.h"

void effinfer::causal_conv1d_avx2(const CausalConv1d& a, const CausalConv1dPart& part) {
  dispatch(a, part);
}
