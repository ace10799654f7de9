// What a bench/<op>.cpp offers: cases, each with the work it does. The harness times them, on every
// thread count and instruction set asked for, and prints each beside its floor.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace effinfer::bench {

// Which of the machine's rates bounds a case's arithmetic (see ceilings.h).
enum class Peak : int8_t { fma, int8, code };

struct Case {
  std::string shape;  // such as "B1 L512 D1536 N16"
  DType dtype;
  double flops;               // arithmetic operations of one run, an FMA counted as two
  double bytes;               // memory that one run must move at least
  std::function<void()> run;  // owns its buffers
  Peak peak = Peak::fma;
};

// One line at file scope per op: `const Registration kRms("rms_norm", rms_norm_cases);`
struct Registration {
  Registration(const char* op, std::vector<Case> (*cases)());
};

struct Op {
  const char* name;
  std::vector<Case> (*cases)();
};
const std::vector<Op>& registered();

// A float buffer of small, varied, finite values, stored as `type`; 64-byte aligned.
std::shared_ptr<void> values(int64_t n, DType type = DType::f32, float lo = -1.f, float hi = 1.f);

inline float* floats(const std::shared_ptr<void>& buffer) {
  return static_cast<float*>(buffer.get());
}

}  // namespace effinfer::bench
