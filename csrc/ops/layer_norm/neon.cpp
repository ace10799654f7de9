#include "ops/layer_norm/generic.h"

void effinfer::layer_norm_neon(const LayerNorm& a, int64_t begin, int64_t end) {
  dispatch(a, begin, end);
}
