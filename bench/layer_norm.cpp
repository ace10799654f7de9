#include "ops/layer_norm/layer_norm.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case layer_norm_case(int64_t rows, int64_t dim, DType type) {
  const auto x = values(rows * dim, type), y = values(rows * dim, type), weight = values(dim),
             bias = values(dim);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim),
      .dtype = type,
      .flops = 7.0 * static_cast<double>(rows * dim),
      .bytes = 2.0 * static_cast<double>(rows * dim * size_of(type)),
      .run =
          [=] {
            layer_norm({.x = x.get(),
                        .residual = nullptr,
                        .weight = floats(weight),
                        .bias = floats(bias),
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
                        .eps = 1e-5f});
          },
  };
}

std::vector<Case> layer_norm_cases() {
  return {layer_norm_case(1, 768, DType::f32), layer_norm_case(512, 768, DType::f32),
          layer_norm_case(512, 768, DType::bf16), layer_norm_case(4096, 4096, DType::f32)};
}

const Registration kLayerNorm("layer_norm", layer_norm_cases);

}  // namespace
}  // namespace effinfer::bench
