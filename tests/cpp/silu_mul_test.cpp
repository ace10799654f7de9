#include "ops/silu_mul/silu_mul.h"

#include "testing.h"

namespace effinfer {
namespace {

class SiluMulTest : public testing::PerIsa {};
EFFINFER_PER_ISA(SiluMulTest);

template <class T>
void expect_matches_float64(DType type, double bound) {
  for (int64_t dim : {1, 3, 8, 33, 64, 257}) {
    const int64_t rows = 5, stride = dim + 3;
    const auto gate = testing::to_type<T>(testing::random_floats(rows * stride, 7 + dim));
    const auto up = testing::to_type<T>(testing::random_floats(rows * dim, 9 + dim));
    std::vector<T> y(rows * dim);
    silu_mul({.gate = gate.data(),
              .up = up.data(),
              .y = y.data(),
              .rows = rows,
              .dim = dim,
              .gate_stride = stride,
              .up_stride = dim,
              .y_stride = dim,
              .type = type});
    std::vector<double> want(rows * dim);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < dim; ++i) {
        const double g = scalar::get(&gate[row * stride + i]);
        want[row * dim + i] = g / (1 + std::exp(-g)) * scalar::get(&up[row * dim + i]);
      }
    EXPECT_LE(testing::relative_error(y, want), bound) << "dim " << dim;
  }
}

TEST_P(SiluMulTest, MatchesFloat64) {
  expect_matches_float64<float>(DType::f32, 1e-6);
  expect_matches_float64<bf16>(DType::bf16, 4e-3);
  expect_matches_float64<f16>(DType::f16, 5e-4);
}

}  // namespace
}  // namespace effinfer
