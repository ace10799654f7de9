#include "ops/hidden_attention/generic.h"

void effinfer::hidden_attention_neon(const HiddenAttention& a, int64_t row, float* scratch) {
  attend_row(a, row, scratch);
}
