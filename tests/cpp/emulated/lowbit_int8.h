// The text of avx512_vnni.cpp, compiled for AVX2: all of it but two functions that are a few
// instructions there and plain C++ here.
#pragma once
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {

void lowbit_int8_emulated_avx2(const LowbitLinear&, const LowbitRows&, const LinearTask&);

}  // namespace effinfer
