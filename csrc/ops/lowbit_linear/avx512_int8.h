// lowbit_linear with int8 activations on dot_avx512.h: for avx512_vnni.cpp, and its test.
#pragma once
#include "ops/lowbit_linear/dot_avx512.h"
#include "ops/lowbit_linear/int8.h"

namespace effinfer {
namespace {

void int8_any_format(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  switch (a.weight.format) {
    case LowbitFormat::int8:
      return int8_task<Int8>(a, q, t);
    case LowbitFormat::int4:
      return int8_task<Int4>(a, q, t);
    case LowbitFormat::int3:
      return int8_task<Int3>(a, q, t);
    case LowbitFormat::int2:
      return int8_task<Int2>(a, q, t);
    case LowbitFormat::ternary:
      return int8_task<Ternary>(a, q, t);
    case LowbitFormat::ternary_dense:
      return int8_task<TernaryDense>(a, q, t);
    case LowbitFormat::binary:
      return int8_task<Binary>(a, q, t);
  }
}

}  // namespace
}  // namespace effinfer
