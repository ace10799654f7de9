// Where a code lies in a packed panel: the definition of the layouts, one weight at a time.
// Included by scalar files and tests only.
#pragma once
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer::lowbit {
namespace {

// Digit `place` (0 the highest) of a ternary_dense triple, as a value.
constexpr int dense_value(const uint8_t* unit, int i, int lane) {
  const int t = i / 3;
  const int magnitude = unit[16 * (t / 2) + lane] >> (t % 2 * 4) & 15;
  const uint8_t* word = unit + 128 + 2 * lane;
  const bool negative = (word[t / 8] >> (t % 8) & 1) != 0;
  const int digits = (negative ? -magnitude : magnitude) + 13;  // base 3, each digit its value + 1
  const int weight[] = {9, 3, 1};
  return digits / weight[i % 3] % 3 - 1;
}

// The value, before any zero point, of weight k of output `lane` of a panel.
constexpr int value_at(LowbitFormat f, const uint8_t* panel, int64_t k, int lane) {
  const Layout l = layout(f);
  const uint8_t* unit = panel + k / l.unit_k * l.unit_bytes;
  const int i = static_cast<int>(k % l.unit_k);
  const int byte = 4 * lane + i % 4;  // of 64 that hold four consecutive k each
  int code = 0;
  switch (f) {
    case LowbitFormat::int8:
      return static_cast<int8_t>(unit[byte]);
    case LowbitFormat::int4:
      code = unit[byte] >> (i / 4 * 4) & 15;
      break;
    case LowbitFormat::int3:
      code = (unit[i / 16 * 64 + byte] >> (i % 16 / 4 * 2) & 3) | (unit[128 + byte] >> i / 4 & 1)
                                                                      << 2;
      break;
    case LowbitFormat::int2:
    case LowbitFormat::ternary:
      code = unit[byte] >> (i / 4 * 2) & 3;
      break;
    case LowbitFormat::ternary_dense:
      return dense_value(unit, i, lane);
    case LowbitFormat::binary:
      code = unit[16 * (i / 8) + lane] >> (i % 8) & 1;
      break;
  }
  return l.step * code - l.centre;
}

}  // namespace
}  // namespace effinfer::lowbit
