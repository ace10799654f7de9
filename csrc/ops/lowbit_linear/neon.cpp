#include "ops/lowbit_linear/generic.h"
#include "ops/lowbit_linear/neon_int8.h"
#include "ops/lowbit_linear/quantize.h"

namespace effinfer {

void lowbit_quantize_neon(const LowbitLinear& a, const LowbitRows& q, int64_t row, int64_t rows) {
  quantize_rows(a, q, row, rows);
}

void lowbit_int8_neon(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  int8_any_format(a, q, t);
}

void lowbit_float_neon(const LowbitLinear& a, const LinearTask& t) { float_task(a, t); }

}  // namespace effinfer
