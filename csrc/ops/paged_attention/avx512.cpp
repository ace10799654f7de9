#include "ops/paged_attention/generic.h"

void effinfer::paged_attention_avx512(const PagedAttention& a, const AttentionTask& task,
                                      float* scratch) {
  attend(a, task, scratch);
}
