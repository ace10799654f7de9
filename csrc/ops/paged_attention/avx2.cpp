#include "ops/paged_attention/generic.h"

void effinfer::paged_attention_avx2(const PagedAttention& a, const AttentionTask& task) {
  attend(a, task);
}
