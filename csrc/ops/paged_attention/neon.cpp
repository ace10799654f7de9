#include "ops/paged_attention/generic.h"

void effinfer::paged_attention_neon(const PagedAttention& a, const AttentionTask& task,
                                    float* scratch) {
  attend(a, task, scratch);
}
