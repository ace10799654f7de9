#include "ops/rope_write/generic.h"

void effinfer::rope_write_avx2(const RopeWrite& a, int64_t begin, int64_t end) {
  run(a, begin, end);
}
