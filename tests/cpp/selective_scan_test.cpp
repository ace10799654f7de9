#include "ops/selective_scan/selective_scan.h"

#include "testing.h"

namespace effinfer {
namespace {

class SelectiveScanTest : public testing::PerIsa {};
EFFINFER_PER_ISA(SelectiveScanTest);

struct Shape {
  int64_t dim, state, length;
};

template <class T>
void expect_matches_float64(DType type, const Shape& s, bool time_major, double bound) {
  const int64_t n = s.dim * s.length, rows = s.state * s.length;
  const auto u = testing::to_type<T>(testing::random_floats(n, 1));
  const auto delta = testing::to_type<T>(testing::random_floats(n, 2));
  const auto z = testing::to_type<T>(testing::random_floats(n, 3));
  const auto B = testing::to_type<T>(testing::random_floats(rows, 4));
  const auto C = testing::to_type<T>(testing::random_floats(rows, 5));
  const auto D = testing::random_floats(s.dim, 6);
  auto A = testing::random_floats(s.dim * s.state, 7, 4.f);
  for (float& a : A) a = -std::fabs(a);
  const auto initial = testing::random_floats(s.dim * s.state, 8);
  std::vector<T> y(n);
  std::vector<float> last(s.dim * s.state);

  const int64_t channel = time_major ? 1 : s.length, time = time_major ? s.dim : 1;
  const auto signal = [&](const std::vector<T>& v) {
    return ScanSignal{const_cast<T*>(v.data()), 0, channel, time, type};
  };
  const auto matrix = [&](const std::vector<T>& v) {
    return ScanMatrix{v.data(), 0, 0, 1, s.state, 1, type, false};
  };
  SelectiveScan args = {.u = signal(u),
                        .delta = signal(delta),
                        .z = signal(z),
                        .y = signal(y),
                        .A = A.data(),
                        .B = matrix(B),
                        .C = matrix(C),
                        .D = D.data(),
                        .delta_bias = D.data(),
                        .initial_state = initial.data(),
                        .cu_seqlens = nullptr,
                        .mask = nullptr,
                        .mask_batch = 0,
                        .mask_time = 0,
                        .last_state = last.data(),
                        .snapshots = nullptr,
                        .batch = 1,
                        .dim = s.dim,
                        .length = s.length,
                        .state = s.state,
                        .sequences = 1,
                        .num_snapshots = 0,
                        .softplus = true,
                        .reverse = false,
                        .scratch = nullptr};
  std::vector<float> scratch(static_cast<size_t>(selective_scan_scratch(args)) / sizeof(float));
  args.scratch = scratch.data();
  selective_scan(args);

  std::vector<double> want(n), h(initial.begin(), initial.end());
  for (int64_t d = 0; d < s.dim; ++d)
    for (int64_t t = 0; t < s.length; ++t) {
      const int64_t at = d * channel + t * time;
      const double raw = double{scalar::get(&delta[at])} + D[d];
      const double step = std::log1p(std::exp(raw)), x = scalar::get(&u[at]);
      double out = D[d] * x;
      for (int64_t i = 0; i < s.state; ++i) {
        double& state = h[d * s.state + i];
        state = std::exp(step * A[d * s.state + i]) * state +
                step * x * scalar::get(&B[t * s.state + i]);
        out += scalar::get(&C[t * s.state + i]) * state;
      }
      const double gate = scalar::get(&z[at]);
      want[at] = out * gate / (1 + std::exp(-gate));
    }
  EXPECT_LE(testing::relative_error(y, want), bound) << s.dim << " " << s.state << " " << s.length;
  EXPECT_LE(testing::relative_error(last, h), 1e-6) << s.dim << " " << s.state << " " << s.length;
}

TEST_P(SelectiveScanTest, MatchesFloat64) {
  for (const Shape& s : {Shape{1, 1, 3}, Shape{24, 16, 70}, Shape{67, 7, 131}, Shape{130, 3, 9}})
    for (bool time_major : {true, false}) {
      expect_matches_float64<float>(DType::f32, s, time_major, 1e-6);
      expect_matches_float64<bf16>(DType::bf16, s, time_major, 4e-3);
      expect_matches_float64<f16>(DType::f16, s, time_major, 5e-4);
    }
}

}  // namespace
}  // namespace effinfer
