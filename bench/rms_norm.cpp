#include "ops/rms_norm/rms_norm.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case rms_norm_case(int64_t rows, int64_t dim, DType type) {
  const auto x = values(rows * dim, type), weight = values(dim), y = values(rows * dim, type);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim),
      .dtype = type,
      .flops = 4.0 * static_cast<double>(rows * dim),
      .bytes = 2.0 * static_cast<double>(rows * dim * size_of(type)),
      .run =
          [=] {
            rms_norm({.x = x.get(),
                      .residual = nullptr,
                      .weight = floats(weight),
                      .y = y.get(),
                      .residual_out = nullptr,
                      .rows = rows,
                      .dim = dim,
                      .x_stride = dim,
                      .residual_stride = 0,
                      .y_stride = dim,
                      .residual_out_stride = 0,
                      .x_type = type,
                      .residual_type = type,
                      .residual_out_type = type,
                      .eps = 1e-6f,
                      .unit_offset = false});
          },
  };
}

std::vector<Case> rms_norm_cases() {
  return {rms_norm_case(1, 768, DType::f32), rms_norm_case(512, 768, DType::f32),
          rms_norm_case(512, 768, DType::bf16), rms_norm_case(4096, 4096, DType::f32)};
}

const Registration kRmsNorm("rms_norm", rms_norm_cases);

}  // namespace
}  // namespace effinfer::bench
