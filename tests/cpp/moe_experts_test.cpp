#include "ops/moe_experts/moe_experts.h"

#include <memory>

#include "testing.h"

namespace effinfer {
namespace {

constexpr int64_t kPanel = 16, kRows = 9, kExperts = 3, kTopK = 2;
constexpr int32_t kIndex[kRows * kTopK] = {0, 2, 2, 0, 1, 2, 0, 1, 2, 1, 0, 2, 2, 2, 1, 0, 0, 1};

class MoeExpertsTest : public testing::PerIsa {};
EFFINFER_PER_ISA(MoeExpertsTest);

// [experts, outputs, k] in panels.
std::vector<float> pack(const std::vector<float>& plain, int64_t outputs, int64_t k) {
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  std::vector<float> packed(static_cast<size_t>(kExperts * panels * k * kPanel));
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t n = 0; n < outputs; ++n)
      for (int64_t i = 0; i < k; ++i)
        packed[((e * panels + n / kPanel) * k + i) * kPanel + n % kPanel] =
            plain[(e * outputs + n) * k + i];
  return packed;
}

template <class T>
void expect_matches_float64(DType type, double bound, int64_t dim, int64_t inner, bool gated) {
  const int64_t outputs = gated ? 2 * inner : inner;
  const auto x = testing::to_type<T>(testing::random_floats(kRows * dim, 1));
  const auto weights = testing::random_floats(kRows * kTopK, 2);
  const auto up = testing::random_floats(kExperts * outputs * dim, 3);
  const auto down = testing::random_floats(kExperts * dim * inner, 4);
  std::vector<double> want(kRows * dim), h(outputs);
  for (int64_t pair = 0; pair < kRows * kTopK; ++pair) {
    const int64_t row = pair / kTopK, e = kIndex[pair];
    for (int64_t n = 0; n < outputs; ++n) {
      h[n] = 0;
      for (int64_t i = 0; i < dim; ++i)
        h[n] += double{scalar::get(&x[row * dim + i])} * up[(e * outputs + n) * dim + i];
    }
    for (int64_t n = 0; n < inner; ++n) {
      h[n] /= 1 + std::exp(-h[n]);
      if (gated) h[n] *= h[inner + n];
    }
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (int64_t n = 0; n < inner; ++n) sum += h[n] * down[(e * dim + i) * inner + n];
      want[row * dim + i] += weights[pair] * sum;
    }
  }
  const auto packed_up = pack(up, outputs, dim), packed_down = pack(down, dim, inner);
  std::vector<T> y(kRows * dim);
  MoeExperts args = {.x = x.data(),
                     .index = kIndex,
                     .weights = weights.data(),
                     .up = packed_up.data(),
                     .down = packed_down.data(),
                     .y = y.data(),
                     .rows = kRows,
                     .dim = dim,
                     .inner = inner,
                     .top_k = kTopK,
                     .experts = kExperts,
                     .x_stride = dim,
                     .y_stride = dim,
                     .x_type = type,
                     .up_type = DType::f32,
                     .down_type = DType::f32,
                     .activation = ExpertActivation::silu,
                     .gated = gated,
                     .slots = 2,
                     .scratch = {}};
  const size_t bytes = moe_experts_scratch(args, nullptr);
  std::vector<char> memory(bytes + 64);
  void* aligned = memory.data();
  size_t room = memory.size();
  moe_experts_scratch(args, std::align(64, bytes, aligned, room));
  moe_experts(args);
  EXPECT_LE(testing::relative_error(y, want), bound) << "dim " << dim << ", inner " << inner;
}

TEST_P(MoeExpertsTest, MatchesFloat64) {
  for (const bool gated : {true, false}) {
    for (const int64_t dim : {1, 20, 64}) {
      expect_matches_float64<float>(DType::f32, 2e-6, dim, 7, gated);
      expect_matches_float64<bf16>(DType::bf16, 4e-3, dim, 32, gated);
      expect_matches_float64<f16>(DType::f16, 5e-4, dim, 33, gated);
    }
  }
}

}  // namespace
}  // namespace effinfer
