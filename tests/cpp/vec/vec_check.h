// What each instruction set's build of vec.h reports to vec_test.cpp: plain function pointers, so
// that no inline function crosses from a file with that set's flags.
#pragma once
#include <cstdint>

namespace effinfer::vec_check {

struct Vectors {
  int lanes;
  // y[i] = f(x[i]) for n numbers, n a multiple of the lanes.
  using Map = void (*)(const float* x, float* y, int64_t n);
  Map exp, exp2, log1p_unit, softplus, sigmoid, silu;
  // Reads n 16-bit numbers into floats, and writes floats as 16-bit numbers.
  using Widen = void (*)(const uint16_t* x, float* y, int64_t n);
  using Narrow = void (*)(const float* x, uint16_t* y, int64_t n);
  Widen load_bf16, load_f16;
  Narrow store_bf16, store_f16;
  // load_n, then store_n, of the first n < lanes elements; load_strided and store_strided likewise.
  void (*copy_part)(const float* x, float* y, int64_t n);
  void (*copy_strided)(const float* x, float* y, int64_t stride, int64_t n);
  float (*sum)(const float* x);
};

const Vectors& avx2();
const Vectors& avx512();
const Vectors& neon();

}  // namespace effinfer::vec_check
