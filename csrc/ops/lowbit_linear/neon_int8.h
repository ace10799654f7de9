// lowbit_linear with int8 activations, at whatever level of NEON this file is compiled for.
#pragma once
#include "ops/lowbit_linear/dot_neon.h"
#include "ops/lowbit_linear/int8.h"

namespace effinfer {
namespace {

void int8_any_format(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  using enum LowbitFormat;
  switch (a.weight.format) {
    case int8:
      return int8_task<Packed<int8>>(a, q, t);
    case int4:
      return int8_task<Packed<int4>>(a, q, t);
    case int3:
      return int8_task<Packed<int3>>(a, q, t);
    case int2:
      return int8_task<Packed<int2>>(a, q, t);
    case ternary:
      return int8_task<Packed<ternary>>(a, q, t);
    case ternary_dense:
      return int8_task<Packed<ternary_dense>>(a, q, t);
    case binary:
      return int8_task<Packed<binary>>(a, q, t);
  }
}

}  // namespace
}  // namespace effinfer
