#include "ops/linear/linear.h"

#include "base/scalar.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::expect_same;
using testing::Floats;
using testing::random_floats;

// Few and many rows, with a tail of every size, and a gate.
TEST(ShimLinear, MatchesScalar) {
  constexpr int64_t kN = 37, kK = 70;
  for (const int64_t rows : {1, 9, 17, 70})
    for (const Epilogue epilogue : {Epilogue::none, Epilogue::silu_mul}) {
      Linear a = {};
      a.rows = rows;
      a.n = kN;
      a.k = kK;
      a.epilogue = epilogue;
      const int64_t panels = linear_layout::panels(a);
      const Floats x = random_floats(rows * kK, 1), bias = random_floats(2 * kN, 2),
                   residual = random_floats(rows * kN, 3),
                   weight = random_floats(panels * kK * linear_layout::kPanel, 4);
      a.x = x.data();
      a.weight = weight.data();
      a.bias = bias.data();
      a.residual = residual.data();
      a.x_stride = kK;
      a.residual_stride = a.y_stride = kN;
      const auto with_output = [&](auto& out) {
        Linear filled = a;
        filled.y = out[0].data();
        return filled;
      };
      expect_same(
          {Floats(rows * kN)},
          [&](auto& out) { linear_scalar(with_output(out), {0, rows, 0, panels, 1, nullptr}); },
          [&](auto& out) { return linear_cuda(with_output(out), nullptr); });
    }
}

// The tensor cores' kernels: close to the scalar one, and a row's bits are those of that row alone,
// in small tiles and large, with rows that 16-byte copies can read and rows that they cannot.
template <class T>
void check_tensor_cores(DType type, int64_t n, int64_t k, int64_t x_stride, Epilogue epilogue) {
  Linear a = {};
  a.n = n;
  a.k = k;
  a.x_type = a.weight_type = type;
  a.x_stride = x_stride;
  a.y_stride = n;
  a.epilogue = epilogue;
  const int64_t panels = linear_layout::panels(a);
  const auto rounded = [](const Floats& values) {
    std::vector<T> out(values.size());
    for (size_t i = 0; i < out.size(); ++i) scalar::put(&out[i], values[i]);
    return out;
  };
  constexpr int64_t kMost = 130;
  const auto x = rounded(random_floats(kMost * x_stride, 1));
  const auto weight = rounded(random_floats(panels * k * linear_layout::kPanel, 2));
  const Floats bias = random_floats(2 * n, 3);
  alignas(16) static T aligned[1 << 18];
  ASSERT_LE(weight.size(), std::size(aligned));
  std::copy(weight.begin(), weight.end(), aligned);
  a.weight = aligned;
  a.bias = bias.data();
  const auto run = [&](int64_t first, int64_t rows, bool on_gpu) {
    std::vector<T> y(rows * n);
    Linear filled = a;
    filled.rows = rows;
    filled.x = x.data() + first * x_stride;
    filled.y = y.data();
    if (on_gpu) {
      EXPECT_EQ(linear_cuda(filled, nullptr), 0) << gpu::shim::last_error();
    } else {
      linear_scalar(filled, {0, rows, 0, panels, 1, nullptr});
    }
    Floats out(y.size());
    for (size_t i = 0; i < out.size(); ++i) out[i] = scalar::get(&y[i]);
    return out;
  };
  const Floats want = run(0, kMost, false), alone = run(kMost - 1, 1, true);
  for (const int64_t rows : {kMost, int64_t{16}, int64_t{9}, int64_t{1}}) {
    const int64_t first = kMost - rows;
    const Floats got = run(first, rows, true);
    EXPECT_LE(testing::relative_error(got, {want.begin() + first * n, want.end()}), 4e-3);
    EXPECT_EQ(std::memcmp(&got[(rows - 1) * n], alone.data(), n * sizeof(float)), 0) << rows;
  }
  gpu::shim::set_reverse(true);
  EXPECT_EQ(run(0, kMost, true), run(0, kMost, true));
  EXPECT_EQ(run(kMost - 1, 1, true), alone);
  gpu::shim::set_reverse(false);
}

TEST(ShimLinear, TensorCores) {
  check_tensor_cores<bf16>(DType::bf16, 37, 70, 71, Epilogue::none);
  check_tensor_cores<f16>(DType::f16, 37, 300, 304, Epilogue::silu_mul);
  check_tensor_cores<bf16>(DType::bf16, 40, 1064, 1064, Epilogue::gelu_mul);
  check_tensor_cores<f16>(DType::f16, 9000, 8, 8, Epilogue::silu);  // the large tiles
}

}  // namespace
}  // namespace effinfer
