#include "ops/low_rank_add/low_rank_add.h"

#include "testing.h"

namespace effinfer {
namespace {

constexpr int64_t kPanel = LowRankAdd::kPanel;

class LowRankAddTest : public testing::PerIsa {};
EFFINFER_PER_ISA(LowRankAddTest);

// Two linears side by side, their last panels partly filled; rows of three groups.
template <class T>
void expect_matches_float64(DType type, double bound) {
  const int64_t rows = 9, groups = 3, rank[] = {3, 8}, outputs[] = {37, 16}, n = 53;
  const int32_t index[rows] = {0, 0, 0, 0, 0, 1, 2, 2, 2};
  for (int64_t k : {1, 7, 64, 131}) {
    const int64_t all = rank[0] + rank[1], up_size = kPanel * (3 * rank[0] + rank[1]);
    const auto x = testing::to_type<T>(testing::random_floats(rows * k, 1 + k));
    const auto down = testing::to_type<T>(testing::random_floats(groups * all * k, 2 + k));
    const auto up = testing::to_type<T>(testing::random_floats(groups * up_size, 3 + k));
    const auto bias = testing::random_floats(groups * n, 4 + k);
    auto y = testing::to_type<T>(testing::random_floats(rows * n, 5 + k));
    std::vector<double> want(y.size());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t g = index[row];
      int64_t column = 0, low_row = 0, base = g * up_size;
      for (int p = 0; p < 2; ++p) {
        for (int64_t j = 0; j < outputs[p]; ++j, ++column) {
          double sum = scalar::get(&y[row * n + column]) + double{bias[g * n + column]};
          for (int64_t r = 0; r < rank[p]; ++r) {
            double low = 0;
            for (int64_t i = 0; i < k; ++i)
              low += double{scalar::get(&x[row * k + i])} *
                     scalar::get(&down[(g * all + low_row + r) * k + i]);
            sum += low * scalar::get(&up[base + (j / kPanel * rank[p] + r) * kPanel + j % kPanel]);
          }
          want[row * n + column] = sum;
        }
        low_row += rank[p];
        base += (outputs[p] + kPanel - 1) / kPanel * kPanel * rank[p];
      }
    }
    std::vector<float> low(rows * all);
    low_rank_add({.x = x.data(),
                  .index = index,
                  .down = down.data(),
                  .up = up.data(),
                  .bias = bias.data(),
                  .y = y.data(),
                  .low = low.data(),
                  .parts = {{outputs[0], rank[0]}, {outputs[1], rank[1]}},
                  .part_count = 2,
                  .rows = rows,
                  .k = k,
                  .n = n,
                  .rank = all,
                  .up_size = up_size,
                  .x_stride = k,
                  .y_stride = n,
                  .x_type = type,
                  .weight_type = type});
    EXPECT_LE(testing::relative_error(y, want), bound) << "k " << k;
  }
}

TEST_P(LowRankAddTest, MatchesFloat64) {
  expect_matches_float64<float>(DType::f32, 2e-6);
  expect_matches_float64<bf16>(DType::bf16, 4e-3);
  expect_matches_float64<f16>(DType::f16, 5e-4);
}

}  // namespace
}  // namespace effinfer
