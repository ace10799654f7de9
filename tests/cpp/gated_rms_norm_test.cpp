#include "ops/gated_rms_norm/gated_rms_norm.h"

#include "testing.h"

namespace effinfer {
namespace {

class GatedRmsNormTest : public testing::PerIsa {};
EFFINFER_PER_ISA(GatedRmsNormTest);

template <class T>
void expect_matches_float64(DType type, double bound, int64_t group, bool before) {
  const int64_t rows = 3, dim = 3 * group, stride = dim + 5;
  const auto x = testing::to_type<T>(testing::random_floats(rows * stride, 1));
  const auto z = testing::to_type<T>(testing::random_floats(rows * stride, 2, 3.f));
  const auto weight = testing::random_floats(dim, 3);
  std::vector<T> y(rows * dim);
  gated_rms_norm({.x = x.data(),
                  .z = z.data(),
                  .weight = weight.data(),
                  .y = y.data(),
                  .rows = rows,
                  .dim = dim,
                  .group = group,
                  .x_stride = stride,
                  .z_stride = stride,
                  .y_stride = dim,
                  .type = type,
                  .eps = 1e-5f,
                  .norm_before_gate = before});
  std::vector<double> want(rows * dim);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t first = 0; first < dim; first += group) {
      const auto gate = [&](int64_t i) {
        const double v = scalar::get(&z[row * stride + i]);
        return v / (1 + std::exp(-v));
      };
      const auto value = [&](int64_t i) {
        return double{scalar::get(&x[row * stride + i])} * (before ? 1 : gate(i));
      };
      double squares = 0;
      for (int64_t i = first; i < first + group; ++i) squares += value(i) * value(i);
      const double scale = 1 / std::sqrt(squares / group + 1e-5);
      for (int64_t i = first; i < first + group; ++i)
        want[row * dim + i] = value(i) * scale * weight[i] * (before ? gate(i) : 1);
    }
  }
  EXPECT_LE(testing::relative_error(y, want), bound) << "group " << group << " before " << before;
}

TEST_P(GatedRmsNormTest, MatchesFloat64) {
  for (int64_t group : {1, 7, 8, 65, 512}) {
    for (bool before : {false, true}) {
      expect_matches_float64<float>(DType::f32, 1e-6, group, before);
      expect_matches_float64<bf16>(DType::bf16, 4e-3, group, before);
      expect_matches_float64<f16>(DType::f16, 5e-4, group, before);
    }
  }
}

}  // namespace
}  // namespace effinfer
