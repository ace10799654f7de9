#include "ops/softmax_top2/softmax_top2.h"

#include <algorithm>
#include <functional>

#include "testing.h"

namespace effinfer {
namespace {

class SoftmaxTop2Test : public testing::PerIsa {};
EFFINFER_PER_ISA(SoftmaxTop2Test);

template <class T>
void expect_matches_float64(DType type) {
  for (int64_t dim : {1, 2, 8, 33, 64, 257, 5000}) {
    const int64_t rows = 3, stride = dim + 3;
    const auto x = testing::to_type<T>(testing::random_floats(rows * stride, 7 + dim));
    std::vector<float> y(rows * 2);
    softmax_top2(
        {.x = x.data(), .y = y.data(), .rows = rows, .dim = dim, .x_stride = stride, .type = type});
    std::vector<double> want;
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> values;
      for (int64_t i = 0; i < dim; ++i) values.push_back(scalar::get(&x[row * stride + i]));
      std::sort(values.begin(), values.end(), std::greater<>());
      double total = 0;
      for (const double value : values) total += std::exp(value - values[0]);
      want.push_back(1 / total);
      want.push_back(dim > 1 ? std::exp(values[1] - values[0]) / total : 0);
    }
    EXPECT_LE(testing::relative_error(y, want), 2e-6) << "dim " << dim;
  }
}

TEST_P(SoftmaxTop2Test, MatchesFloat64) {
  expect_matches_float64<float>(DType::f32);
  expect_matches_float64<bf16>(DType::bf16);
  expect_matches_float64<f16>(DType::f16);
}

}  // namespace
}  // namespace effinfer
