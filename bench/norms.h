// The cases that rms_norm and layer_norm are timed on.
#pragma once
#include "bench.h"

namespace effinfer::bench {

// `flops` is per element.
template <class Norm>
Case norm_case(void (*norm)(const Norm&), double flops, int64_t rows, int64_t dim, DType type) {
  const auto x = values(rows * dim, type), y = values(rows * dim, type), weight = values(dim),
             bias = values(dim);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim),
      .dtype = type,
      .flops = flops * static_cast<double>(rows * dim),
      .bytes = 2.0 * static_cast<double>(rows * dim * size_of(type)),
      .run =
          [=] {
            Norm a = {};
            a.x = x.get();
            a.y = y.get();
            a.weight = floats(weight);
            if constexpr (requires { a.bias; }) a.bias = floats(bias);
            a.rows = rows;
            a.dim = a.x_stride = a.y_stride = dim;
            a.x_type = a.residual_type = a.residual_out_type = type;
            a.eps = 1e-5f;
            norm(a);
          },
  };
}

template <class Norm>
std::vector<Case> norm_cases(void (*norm)(const Norm&), double flops) {
  return {norm_case(norm, flops, 1, 768, DType::f32), norm_case(norm, flops, 512, 768, DType::f32),
          norm_case(norm, flops, 512, 768, DType::bf16),
          norm_case(norm, flops, 4096, 4096, DType::f32)};
}

}  // namespace effinfer::bench
