#include "ops/hidden_attention/hidden_attention.h"

#include "testing.h"

namespace effinfer {
namespace {

class HiddenAttentionTest : public testing::PerIsa {};
EFFINFER_PER_ISA(HiddenAttentionTest);

template <class T>
void expect_matches_float64(DType type, int64_t dim, int64_t state, int64_t length) {
  const auto delta = testing::to_type<T>(testing::random_floats(dim * length, 1));
  const auto B = testing::to_type<T>(testing::random_floats(state * length, 2));
  const auto C = testing::to_type<T>(testing::random_floats(state * length, 3));
  auto A = testing::random_floats(dim * state, 4);
  for (float& a : A) a = -std::fabs(a);
  const auto bias = testing::random_floats(dim, 5);
  std::vector<float> alpha(dim * length * length, NAN);
  HiddenAttention args = {};
  args.delta = {const_cast<T*>(delta.data()), 0, 1, dim, type};
  args.A = A.data();
  args.B = {B.data(), 0, 0, 1, state, 1, type, false};
  args.C = {C.data(), 0, 0, 1, state, 1, type, false};
  args.delta_bias = bias.data();
  args.alpha = alpha.data();
  args.batch = 1;
  args.dim = dim;
  args.length = length;
  args.state = state;
  args.softplus = true;
  std::vector<float> scratch(static_cast<size_t>(hidden_attention_scratch(args)) / sizeof(float));
  args.scratch = scratch.data();
  hidden_attention(args);

  std::vector<double> want(alpha.size());
  for (int64_t d = 0; d < dim; ++d) {
    const auto step = [&](int64_t t) {
      return std::log1p(std::exp(double{scalar::get(&delta[t * dim + d])} + bias[d]));
    };
    for (int64_t j = 0; j < length; ++j)
      for (int64_t n = 0; n < state; ++n) {
        double h = step(j) * scalar::get(&B[j * state + n]);
        for (int64_t i = j; i < length; ++i) {
          if (i > j) h *= std::exp(step(i) * A[d * state + n]);
          want[(d * length + i) * length + j] += h * scalar::get(&C[i * state + n]);
        }
      }
  }
  EXPECT_LE(testing::relative_error(alpha, want), 1e-6) << dim << " " << state << " " << length;
}

TEST_P(HiddenAttentionTest, MatchesFloat64) {
  for (int64_t length : {8, 19, 48}) {
    expect_matches_float64<float>(DType::f32, 3, 16, length);
    expect_matches_float64<bf16>(DType::bf16, 2, 5, length);
    expect_matches_float64<f16>(DType::f16, 1, 1, length);
  }
  expect_matches_float64<float>(DType::f32, 3, 1, 1);  // one term: nothing cancels
}

}  // namespace
}  // namespace effinfer
