#include "ops/binary_linear/binary_linear.h"

#include "base/thread_pool.h"
#include "testing.h"

namespace effinfer {
namespace {

using namespace binary_layout;

class BinaryLinearTest : public testing::PerIsa {};
EFFINFER_PER_ISA(BinaryLinearTest);

bool negative(float x) { return x < 0; }

// The signs of [n, k] as panels of 32 outputs.
std::vector<uint8_t> pack(const std::vector<float>& weight, int64_t n, int64_t k) {
  std::vector<uint8_t> packed(panels_of(n) * bytes_of(k) * kOutputs);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      if (negative(weight[row * k + i]))
        packed[(row / kOutputs * bytes_of(k) + i / 8) * kOutputs + row % kOutputs] |= 1 << i % 8;
  return packed;
}

// A problem with guard elements between and after the rows of y.
struct Problem {
  int64_t rows, n, k, x_stride = k + 3, y_stride = n + 5;
  std::vector<float> x = testing::random_floats(rows * x_stride, 1);
  std::vector<float> weight = testing::random_floats(n * k, 2);
  std::vector<float> scale = testing::random_floats(n, 3);
  std::vector<float> bias = testing::random_floats(n, 4);
  std::vector<float> y = std::vector<float>(rows * y_stride, 7.f);

  void run(bool scaled, int64_t slots = 1) {
    const std::vector<uint8_t> packed = pack(weight, n, k);
    BinaryLinear a = {};
    a.x = x.data();
    a.weight = packed.data();
    if (scaled) {
      a.weight_scale = scale.data();
      a.bias = bias.data();
      a.mean_scale = true;
    }
    a.y = y.data();
    a.rows = rows;
    a.n = n;
    a.k = k;
    a.panel_stride = bytes_of(k) * kOutputs;
    a.x_stride = x_stride;
    a.y_stride = y_stride;
    a.slots = slots;
    std::vector<char> scratch(binary_linear_scratch(a) + 64);
    a.scratch =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    binary_linear(a);
  }

  int dot(int64_t row, int64_t out) const {
    int sum = 0;
    for (int64_t i = 0; i < k; ++i)
      sum += negative(x[row * x_stride + i]) == negative(weight[out * k + i]) ? 1 : -1;
    return sum;
  }

  void expect_exact() const {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t out = 0; out < n; ++out)
        ASSERT_EQ(y[row * y_stride + out], static_cast<float>(dot(row, out)))
            << rows << " rows, " << n << " x " << k << ", row " << row << ", output " << out;
      for (int64_t i = n; i < y_stride; ++i)
        ASSERT_EQ(y[row * y_stride + i], 7.f) << "wrote past row " << row;
    }
  }
};

TEST_P(BinaryLinearTest, DotProductsAreExact) {
  for (int64_t rows : {1, 2, 3, 4, 5, 9, 17})
    for (int64_t n : {1, 33, 64, 97, 130})
      for (int64_t k : {0, 1, 64, 247, 249, 513}) {
        Problem p{.rows = rows, .n = n, .k = k};
        p.run(false);
        p.expect_exact();
      }
}

TEST_P(BinaryLinearTest, NoCounterOverflows) {
  for (const float sign : {1.f, -1.f}) {
    Problem p{.rows = 5, .n = 40, .k = 65536};
    p.x.assign(p.x.size(), sign);
    p.weight.assign(p.weight.size(), -1.f);
    p.run(false);
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t out = 0; out < p.n; ++out)
        ASSERT_EQ(p.y[row * p.y_stride + out], -sign * 65536.f);
  }
}

TEST_P(BinaryLinearTest, EveryIsaAndThreadGivesTheSameBits) {
  Problem p{.rows = 101, .n = 333, .k = 521}, scalar = p, threaded = p;
  p.run(true);
  set_pool(thread_pool(3));
  threaded.run(true, 3);
  set_pool(nullptr);
  EXPECT_EQ(p.y, threaded.y);
  ASSERT_TRUE(set_isa_cap("scalar"));
  scalar.run(true);
  EXPECT_EQ(p.y, scalar.y);
}

}  // namespace
}  // namespace effinfer
