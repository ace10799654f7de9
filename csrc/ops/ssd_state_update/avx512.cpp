#include "ops/ssd_state_update/generic.h"

void effinfer::ssd_state_update_avx512(const SsdStateUpdate& a, int64_t row, int64_t head_begin,
                                       int64_t head_end) {
  update_heads(a, row, head_begin, head_end);
}
