#include "ops/linear/linear.h"

#include "base/thread_pool.h"
#include "testing.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;

class LinearTest : public testing::PerIsa {};
EFFINFER_PER_ISA(LinearTest);

// [n, k] into panels, as pack_linear does; `panel_step` leaves room for a second matrix.
template <class W>
void pack(const std::vector<W>& weight, int64_t n, int64_t k, int64_t panel_step, W* out) {
  for (int64_t row = 0; row < n; ++row) {
    const int64_t lane = row % kPanel;
    const int64_t place = !std::is_same_v<W, bf16> ? lane : lane < 8 ? 2 * lane : 2 * lane - 15;
    for (int64_t i = 0; i < k; ++i)
      out[(row / kPanel * panel_step * k + i) * kPanel + place] = weight[row * k + i];
  }
}

// A problem with guard elements between and after the rows of y.
template <class X, class W>
struct Problem {
  int64_t rows, n, k, x_stride = k + 3, y_stride = n + 5;
  Epilogue epilogue = Epilogue::none;
  int64_t parts = takes_two(epilogue) ? 2 : 1;
  std::vector<X> x = testing::to_type<X>(testing::random_floats(rows * x_stride, 1));
  std::vector<W> weight = testing::to_type<W>(testing::random_floats(parts * n * k, 2, 0.1f));
  std::vector<float> bias = testing::random_floats(parts * n, 3);
  std::vector<X> residual = testing::to_type<X>(testing::random_floats(rows * n, 4));
  std::vector<X> y = testing::to_type<X>(std::vector<float>(rows * y_stride, 7.f));

  void run(DType x_type, DType w_type, int64_t slots = 1) {
    Linear a = {.x = x.data(),
                .weight = nullptr,
                .bias = bias.data(),
                .residual = residual.data(),
                .y = y.data(),
                .rows = rows,
                .n = n,
                .k = k,
                .x_stride = x_stride,
                .residual_stride = n,
                .y_stride = y_stride,
                .x_type = x_type,
                .weight_type = w_type,
                .epilogue = epilogue,
                .scratch = nullptr,
                .slots = slots};
    std::vector<W> packed(linear_layout::panels(a) * k * kPanel);
    for (int64_t part = 0; part < parts; ++part)
      pack({weight.begin() + part * n * k, weight.begin() + (part + 1) * n * k}, n, k, parts,
           packed.data() + part * k * kPanel);
    a.weight = packed.data();
    std::vector<float> scratch(linear_scratch(a) / sizeof(float));
    a.scratch = scratch.data();
    linear(a);
  }

  double dot(int64_t row, int64_t part, int64_t out) const {
    double sum = bias[part * n + out];
    for (int64_t i = 0; i < k; ++i)
      sum += double{scalar::get(&x[row * x_stride + i])} *
             scalar::get(&weight[(part * n + out) * k + i]);
    return sum;
  }

  static double activate(Epilogue e, double v) {
    switch (e) {
      case Epilogue::none:
        return v;
      case Epilogue::silu:
      case Epilogue::silu_mul:
        return v / (1 + std::exp(-v));
      case Epilogue::gelu:
      case Epilogue::gelu_mul:
        return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
      case Epilogue::gelu_tanh:
        return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    }
    return v;
  }

  void expect_matches_float64(double bound) const {
    std::vector<X> got;
    std::vector<double> want;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t out = 0; out < n; ++out) {
        double v = activate(epilogue, dot(row, 0, out));
        if (parts == 2) v *= dot(row, 1, out);
        want.push_back(v + scalar::get(&residual[row * n + out]));
        got.push_back(y[row * y_stride + out]);
      }
      for (int64_t i = n; i < y_stride; ++i)
        EXPECT_EQ(scalar::get(&y[row * y_stride + i]), 7.f) << "wrote past row " << row;
    }
    EXPECT_LE(testing::relative_error(got, want), bound)
        << rows << " rows, " << n << " x " << k << ", epilogue " << static_cast<int>(epilogue);
  }
};

template <class X, class W>
void expect_matches_float64(DType x_type, DType w_type, double bound) {
  for (int64_t rows : {1, 2, 3, 7, 14, 31, 100})
    for (int64_t n : {1, 16, 57})
      for (int64_t k : {0, 1, 67, 300}) {
        Problem<X, W> p{.rows = rows, .n = n, .k = k};
        p.run(x_type, w_type);
        p.expect_matches_float64(bound);
      }
  for (Epilogue e : {Epilogue::silu, Epilogue::gelu, Epilogue::gelu_tanh, Epilogue::silu_mul,
                     Epilogue::gelu_mul}) {
    Problem<X, W> p{.rows = 9, .n = 83, .k = 40, .epilogue = e};
    p.run(x_type, w_type);
    p.expect_matches_float64(bound);
  }
}

TEST_P(LinearTest, Float32MatchesFloat64) {
  expect_matches_float64<float, float>(DType::f32, DType::f32, 1e-6);
}
TEST_P(LinearTest, Bfloat16MatchesFloat64) {
  expect_matches_float64<bf16, bf16>(DType::bf16, DType::bf16, 4e-3);
}
TEST_P(LinearTest, Float16MatchesFloat64) {
  expect_matches_float64<f16, f16>(DType::f16, DType::f16, 5e-4);
}
TEST_P(LinearTest, Float32OnBfloat16WeightsMatchesFloat64) {
  expect_matches_float64<float, bf16>(DType::f32, DType::bf16, 1e-6);
}

TEST_P(LinearTest, RowsAndThreadsDoNotChangeABit) {
  Problem<float, float> all{.rows = 110, .n = 333, .k = 520};
  all.run(DType::f32, DType::f32);
  set_pool(thread_pool(3));
  Problem<float, float> threaded{.rows = 110, .n = 333, .k = 520};
  threaded.run(DType::f32, DType::f32, 3);
  set_pool(nullptr);
  EXPECT_EQ(all.y, threaded.y);
  for (int64_t rows : {1, 2, 5, 6, 8, 13, 16, 17, 97}) {
    Problem<float, float> some{.rows = rows, .n = 333, .k = 520};
    // The same weights and first rows: random_floats fills in order, the bias has its own seed.
    some.run(DType::f32, DType::f32);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t out = 0; out < some.n; ++out)
        ASSERT_EQ(some.y[row * some.y_stride + out], all.y[row * all.y_stride + out])
            << rows << " rows, row " << row << ", output " << out;
  }
}

TEST(Linear, HugePageAdviceAcceptsAnyRange) {
  std::vector<char> small(100), large(5 << 20);
  advise_huge_pages(small.data(), small.size());
  advise_huge_pages(large.data() + 13, large.size() - 13);
  advise_huge_pages(nullptr, 0);
}

}  // namespace
}  // namespace effinfer
