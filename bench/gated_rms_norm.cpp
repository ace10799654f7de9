#include "ops/gated_rms_norm/gated_rms_norm.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case gated_case(int64_t rows, int64_t dim, int64_t group, DType type) {
  const auto x = values(rows * dim, type), z = values(rows * dim, type),
             y = values(rows * dim, type), weight = values(dim);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim) + " group " +
               std::to_string(group),
      .dtype = type,
      .flops = 5.0 * static_cast<double>(rows * dim),
      .bytes = 3.0 * static_cast<double>(rows * dim * size_of(type)),
      .run =
          [=] {
            gated_rms_norm({.x = x.get(),
                            .z = z.get(),
                            .weight = floats(weight),
                            .y = y.get(),
                            .rows = rows,
                            .dim = dim,
                            .group = group,
                            .x_stride = dim,
                            .z_stride = dim,
                            .y_stride = dim,
                            .type = type,
                            .eps = 1e-5f,
                            .norm_before_gate = false});
          },
  };
}

std::vector<Case> gated_cases() {
  return {gated_case(1, 1536, 1536, DType::f32), gated_case(512, 1536, 1536, DType::f32),
          gated_case(512, 1536, 192, DType::f32), gated_case(512, 1536, 1536, DType::bf16)};
}

const Registration kGated("gated_rms_norm", gated_cases);

}  // namespace
}  // namespace effinfer::bench
