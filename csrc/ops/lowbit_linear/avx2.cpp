#include "ops/lowbit_linear/dot_avx2.h"
#include "ops/lowbit_linear/generic.h"
#include "ops/lowbit_linear/int8.h"
#include "ops/lowbit_linear/lookup_avx2.h"
#include "ops/lowbit_linear/quantize.h"
#include "ops/lowbit_linear/reach_avx2.h"
#include "ops/lowbit_linear/row_avx2.h"

namespace effinfer {

void lowbit_quantize_avx2(const LowbitLinear& a, const LowbitRows& q, int64_t row, int64_t rows) {
  quantize_rows(a, q, row, rows);
  if (q.reach != nullptr) measure_reach(q, a.io.k, row, rows, a.io.rows);
  if (q.tables == nullptr) return;
  if (a.weight.format == LowbitFormat::binary)
    make_tables<BinaryLookup>(q, row, rows);
  else
    make_tables<DenseLookup>(q, row, rows);
}

namespace {
template <class F>
void direct_task(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  if (t.rows == 1) return row_task(a, q, t, CodesOfRow<F>{q.codes + t.row * q.stride});
  int8_task<F>(a, q, t);
}
}  // namespace

void lowbit_int8_avx2(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  switch (a.weight.format) {
    case LowbitFormat::int8:
      return direct_task<Int8>(a, q, t);
    case LowbitFormat::int4:
      return direct_task<Int4>(a, q, t);
    case LowbitFormat::int3:
      return direct_task<Int3>(a, q, t);
    case LowbitFormat::int2:
      return direct_task<Int2>(a, q, t);
    case LowbitFormat::ternary:
      return direct_task<Ternary>(a, q, t);
    case LowbitFormat::ternary_dense:
      return q.tables != nullptr ? lookup_task<DenseLookup>(a, q, t)
                                 : int8_task<TernaryDense>(a, q, t);
    case LowbitFormat::binary:
      return q.tables != nullptr ? lookup_task<BinaryLookup>(a, q, t) : int8_task<Binary>(a, q, t);
  }
}

void lowbit_float_avx2(const LowbitLinear& a, const LinearTask& t) { float_task(a, t); }

}  // namespace effinfer
