#include "ops/ssd/generic.h"

void effinfer::ssd_avx512(const Ssd& a, int64_t sequence, int64_t head_begin, int64_t head_end,
                          float* scratch) {
  scan_block(a, sequence, head_begin, head_end, scratch);
}
