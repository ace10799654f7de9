#include "ops/selective_scan_lti/selective_scan_lti.h"

#include <complex>

#include "testing.h"

namespace effinfer {
namespace {

class SelectiveScanLtiTest : public testing::PerIsa {};
EFFINFER_PER_ISA(SelectiveScanLtiTest);

struct Shape {
  int64_t dim, state, length;
};

// Element i of coefficients or states in either form.
std::complex<double> number(const std::vector<float>& v, bool complex, int64_t i) {
  return complex ? std::complex<double>{v[2 * i], v[2 * i + 1]} : std::complex<double>{v[i], 0};
}

template <class T>
void expect_matches_float64(DType type, const Shape& s, bool complex, bool time_major,
                            double bound) {
  const int64_t n = s.dim * s.length, numbers = s.dim * s.state * (complex ? 2 : 1);
  const auto u = testing::to_type<T>(testing::random_floats(n, 1));
  auto A = testing::random_floats(numbers, 2);
  for (float& a : A) a = 0.7f * std::tanh(a);  // inside the unit circle
  const auto B = testing::random_floats(numbers, 3), C = testing::random_floats(numbers, 4);
  const auto D = testing::random_floats(s.dim, 5), initial = testing::random_floats(numbers, 6);
  std::vector<T> y(n);
  std::vector<float> last(numbers);

  const int64_t channel = time_major ? 1 : s.length, time = time_major ? s.dim : 1;
  SelectiveScanLti args = {};
  args.u = {const_cast<T*>(u.data()), 0, channel, time, type};
  args.y = {y.data(), 0, channel, time, type};
  args.A = A.data();
  args.B = B.data();
  args.C = C.data();
  args.D = D.data();
  args.initial_state = initial.data();
  args.last_state = last.data();
  args.batch = args.sequences = 1;
  args.dim = s.dim;
  args.length = s.length;
  args.state = s.state;
  args.complex = complex;
  std::vector<float> scratch(static_cast<size_t>(selective_scan_lti_scratch(args)) / sizeof(float));
  args.scratch = scratch.data();
  selective_scan_lti(args);

  std::vector<double> want(n), states;
  for (int64_t d = 0; d < s.dim; ++d) {
    std::vector<std::complex<double>> h(s.state);
    for (int64_t i = 0; i < s.state; ++i) h[i] = number(initial, complex, d * s.state + i);
    for (int64_t t = 0; t < s.length; ++t) {
      const int64_t at = d * channel + t * time;
      const double x = scalar::get(&u[at]);
      want[at] = D[d] * x;
      for (int64_t i = 0; i < s.state; ++i) {
        const int64_t j = d * s.state + i;
        h[i] = number(A, complex, j) * h[i] + number(B, complex, j) * x;
        want[at] += (number(C, complex, j) * h[i]).real();
      }
    }
    for (const auto& value : h) {
      states.push_back(value.real());
      if (complex) states.push_back(value.imag());
    }
  }
  EXPECT_LE(testing::relative_error(y, want), bound) << s.dim << " " << s.state << " " << s.length;
  EXPECT_LE(testing::relative_error(last, states), 1e-6) << s.dim << " " << s.state;
}

TEST_P(SelectiveScanLtiTest, MatchesFloat64) {
  for (const Shape& s : {Shape{1, 1, 3}, Shape{24, 16, 70}, Shape{67, 7, 131}, Shape{130, 3, 9}})
    for (bool complex : {false, true})
      for (bool time_major : {true, false}) {
        expect_matches_float64<float>(DType::f32, s, complex, time_major, 1e-6);
        expect_matches_float64<bf16>(DType::bf16, s, complex, time_major, 4e-3);
        expect_matches_float64<f16>(DType::f16, s, complex, time_major, 5e-4);
      }
}

}  // namespace
}  // namespace effinfer
