#include "ops/layer_norm/layer_norm.h"

#include "testing.h"

namespace effinfer {
namespace {

class LayerNormTest : public testing::PerIsa {};
EFFINFER_PER_ISA(LayerNormTest);

template <class T, class R>
void expect_matches_float64(DType type, DType residual_type, double bound) {
  for (int64_t dim : {1, 3, 8, 33, 64, 257, 768}) {
    const int64_t rows = 5, stride = dim + 3;
    const auto x = testing::to_type<T>(testing::random_floats(rows * stride, 7 + dim));
    const auto residual = testing::to_type<R>(testing::random_floats(rows * dim, 9 + dim));
    const auto weight = testing::random_floats(dim, 11), bias = testing::random_floats(dim, 13);
    std::vector<T> y(rows * dim);
    std::vector<R> r(rows * dim);
    layer_norm({.x = x.data(),
                .residual = residual.data(),
                .weight = weight.data(),
                .bias = bias.data(),
                .y = y.data(),
                .residual_out = r.data(),
                .rows = rows,
                .dim = dim,
                .x_stride = stride,
                .residual_stride = dim,
                .y_stride = dim,
                .residual_out_stride = dim,
                .x_type = type,
                .residual_type = residual_type,
                .residual_out_type = residual_type,
                .eps = 1e-5f});
    std::vector<double> want_y(rows * dim), want_r(rows * dim);
    for (int64_t row = 0; row < rows; ++row) {
      double total = 0, squares = 0;
      for (int64_t i = 0; i < dim; ++i) {
        double& v = want_r[row * dim + i];
        v = double{scalar::get(&x[row * stride + i])} + scalar::get(&residual[row * dim + i]);
        total += v;
      }
      const double mean = total / dim;
      for (int64_t i = 0; i < dim; ++i) squares += std::pow(want_r[row * dim + i] - mean, 2);
      const double scale = 1 / std::sqrt(squares / dim + 1e-5);
      for (int64_t i = 0; i < dim; ++i)
        want_y[row * dim + i] = (want_r[row * dim + i] - mean) * scale * weight[i] + bias[i];
    }
    EXPECT_LE(testing::relative_error(y, want_y), bound) << "dim " << dim;
    EXPECT_LE(testing::relative_error(r, want_r), bound) << "dim " << dim;
  }
}

TEST_P(LayerNormTest, MatchesFloat64) {
  expect_matches_float64<float, float>(DType::f32, DType::f32, 1e-6);
  expect_matches_float64<bf16, bf16>(DType::bf16, DType::bf16, 4e-3);
  expect_matches_float64<f16, f16>(DType::f16, DType::f16, 5e-4);
  expect_matches_float64<bf16, float>(DType::bf16, DType::f32, 4e-3);
}

}  // namespace
}  // namespace effinfer
