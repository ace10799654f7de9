#include "ops/selective_scan_lmu/selective_scan_lmu.h"

#include "testing.h"

namespace effinfer {
namespace {

class SelectiveScanLmuTest : public testing::PerIsa {};
EFFINFER_PER_ISA(SelectiveScanLmuTest);

template <class T>
void expect_matches_float64(DType type, int64_t dim, int64_t state, int64_t chunk, double bound) {
  constexpr int64_t kBatch = 2;
  SelectiveScanLmu args = {};
  args.batch = kBatch;
  args.dim = dim;
  args.state = state;
  args.chunk = chunk;
  args.length = 7 * chunk;
  const int64_t rows = kBatch * dim;
  const auto u = testing::to_type<T>(testing::random_floats(rows * args.length, 1));
  const auto initial = testing::random_floats(rows * state, 2);
  const auto transition = testing::random_floats(args.panels() * args.inner() * kLmuPanel, 3,
                                                 1.f / static_cast<float>(state));
  std::vector<T> memories(chunk == 1 ? rows * args.length * state : 0);
  std::vector<float> last(rows * state);
  args.u = {const_cast<T*>(u.data()), dim * args.length, 1, dim, type};
  args.transition = transition.data();
  args.initial_state = initial.data();
  args.memories = memories.empty() ? nullptr : memories.data();
  args.last_state = last.data();
  std::vector<float> scratch(static_cast<size_t>(selective_scan_lmu_scratch(args)) / sizeof(float));
  args.scratch = scratch.data();
  selective_scan_lmu(args);

  std::vector<double> all, states;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> m(initial.begin() + row * state, initial.begin() + (row + 1) * state);
    for (int64_t t = 0; t < args.length; t += chunk) {
      std::vector<double> next(state);
      for (int64_t n = 0; n < state; ++n)
        for (int64_t j = 0; j < args.inner(); ++j) {
          const int64_t at = (row / dim * args.length + t + j - state) * dim + row % dim;
          const double x = j < state ? m[j] : double{scalar::get(&u[at])};
          next[n] += x * transition[(n / kLmuPanel * args.inner() + j) * kLmuPanel + n % kLmuPanel];
        }
      m = next;
      if (chunk == 1) all.insert(all.end(), m.begin(), m.end());
    }
    states.insert(states.end(), m.begin(), m.end());
  }
  EXPECT_LE(testing::relative_error(memories, all), bound) << dim << " " << state << " " << chunk;
  EXPECT_LE(testing::relative_error(last, states), 1e-6) << dim << " " << state << " " << chunk;
}

TEST_P(SelectiveScanLmuTest, MatchesFloat64) {
  for (int64_t dim : {1, 2, 3, 5})  // blocks of 2, 4, 6, and 6 and 4 rows
    for (int64_t state : {1, 16, 70})
      for (int64_t chunk : {1, 8}) {
        expect_matches_float64<float>(DType::f32, dim, state, chunk, 1e-6);
        expect_matches_float64<bf16>(DType::bf16, dim, state, chunk, 4e-3);
        expect_matches_float64<f16>(DType::f16, dim, state, chunk, 5e-4);
      }
}

}  // namespace
}  // namespace effinfer
