#include "ops/selective_state_update/generic.h"

void effinfer::selective_state_update_avx512(const SelectiveStateUpdate& a, int64_t row,
                                             int64_t begin, int64_t end) {
  update(a, row, begin, end);
}
