#include "ops/silu_mul/silu_mul.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case gate_case(int64_t rows, int64_t dim, DType type) {
  const auto gate = values(rows * dim, type, -4.f, 4.f), up = values(rows * dim, type),
             y = values(rows * dim, type);
  const auto elements = static_cast<double>(rows * dim);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim),
      .dtype = type,
      .flops = 10.0 * elements,
      .bytes = 3.0 * elements * size_of(type),
      .run =
          [=] {
            silu_mul({.gate = gate.get(),
                      .up = up.get(),
                      .y = y.get(),
                      .rows = rows,
                      .dim = dim,
                      .gate_stride = dim,
                      .up_stride = dim,
                      .y_stride = dim,
                      .type = type});
          },
  };
}

std::vector<Case> gate_cases() {
  return {gate_case(1, 1376, DType::f32), gate_case(512, 1376, DType::f32),
          gate_case(512, 1376, DType::bf16)};
}

const Registration kSiluMul("silu_mul", gate_cases);

}  // namespace
}  // namespace effinfer::bench
