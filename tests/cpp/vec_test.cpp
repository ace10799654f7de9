// vec.h against libm in double, and its conversions against base/scalar.h, over every 16-bit
// pattern and a dense sample of floats.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "testing.h"
#include "vec/vec_check.h"

namespace effinfer {
namespace {

using vec_check::Vectors;

class VecTest : public testing::PerIsa {
 protected:
  void SetUp() override {
    testing::PerIsa::SetUp();
    const std::string isa = GetParam();
    if (IsSkipped()) return;
#if defined(__x86_64__)
    if (isa == "avx2") v = &vec_check::avx2();
    if (isa == "avx512") v = &vec_check::avx512();
#else
    if (isa == "neon") v = &vec_check::neon();
#endif
    if (v == nullptr) GTEST_SKIP() << isa << " has no vectors of its own";
  }

  const Vectors* v = nullptr;
};
EFFINFER_PER_ISA(VecTest);

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Every 7919th float in [lo, hi], as many as the longest vector divides.
std::vector<float> sample(float lo, float hi) {
  std::vector<float> x;
  for (uint64_t u = 0; u <= 0xffffffffu; u += 7919) {
    const float f = scalar::bits_to_float(static_cast<uint32_t>(u));
    if (f >= lo && f <= hi) x.push_back(f);
  }
  while (x.size() % 64 != 0) x.push_back(lo);
  return x;
}

// Largest error in units of the last place of the true value, as a float has them.
template <class True>
double worst_ulps(Vectors::Map f, const std::vector<float>& x, True truth) {
  std::vector<float> y(x.size());
  f(x.data(), y.data(), static_cast<int64_t>(x.size()));
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = truth(double{x[i]});
    const double ulp = std::ldexp(1., std::max(std::ilogb(want), -126) - 23);
    worst = std::max(worst, std::abs(y[i] - want) / ulp);
  }
  return worst;
}

std::vector<float> at(Vectors::Map f, std::vector<float> x) {
  const size_t n = x.size();
  x.resize(64);
  std::vector<float> y(64);
  f(x.data(), y.data(), 64);
  y.resize(n);
  return y;
}

TEST_P(VecTest, Exp) {
  const auto truth = [](double x) { return std::exp(x); };
  EXPECT_LE(worst_ulps(v->exp, sample(-87.3f, 88.72f), truth), 2);
  const auto y = at(v->exp, {0.f, -0.f, -88.f, -kInf, 88.8f, kInf, kNan});
  EXPECT_EQ(y[0], 1.f);
  EXPECT_EQ(y[1], 1.f);
  EXPECT_EQ(y[2], 0.f);
  EXPECT_EQ(y[3], 0.f);
  EXPECT_EQ(y[4], kInf);
  EXPECT_EQ(y[5], kInf);
  EXPECT_TRUE(std::isnan(y[6]));
}

TEST_P(VecTest, Exp2) {
  const auto truth = [](double x) { return std::exp2(x); };
  EXPECT_LE(worst_ulps(v->exp2, sample(-126.f, 127.99f), truth), 2);
  const auto y = at(v->exp2, {0.f, 10.f, -126.5f, -kInf, 128.f, kInf, kNan});
  EXPECT_EQ(y[0], 1.f);
  EXPECT_EQ(y[1], 1024.f);
  EXPECT_LE(y[2], FLT_MIN);  // denormal results are not kept apart from 0
  EXPECT_GE(y[2], 0.f);
  EXPECT_EQ(y[3], 0.f);
  EXPECT_EQ(y[4], kInf);
  EXPECT_EQ(y[5], kInf);
  EXPECT_TRUE(std::isnan(y[6]));
}

TEST_P(VecTest, Log1pUnit) {
  const auto truth = [](double x) { return std::log1p(x); };
  EXPECT_LE(worst_ulps(v->log1p_unit, sample(0.f, 1.f), truth), 2);
}

TEST_P(VecTest, Softplus) {
  const auto truth = [](double x) { return x > 20 ? x : std::log1p(std::exp(x)); };
  EXPECT_LE(worst_ulps(v->softplus, sample(-87.f, 1e30f), truth), 4);
  const auto y = at(v->softplus, {-100.f, -kInf, kInf, kNan});
  for (int i : {0, 1}) {  // 0 and denormal results come as the smallest normal number at most
    EXPECT_GE(y[i], 0.f);
    EXPECT_LE(y[i], 1.001f * FLT_MIN);
  }
  EXPECT_EQ(y[2], kInf);
  EXPECT_TRUE(std::isnan(y[3]));
}

// Below 0 the argument of the exponential is rounded: an error of |x| ulps that vec.h states.
TEST_P(VecTest, SigmoidAndSilu) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto silu = [&](double x) { return x * sigmoid(x); };
  EXPECT_LE(worst_ulps(v->sigmoid, sample(0.f, FLT_MAX), sigmoid), 3);
  EXPECT_LE(worst_ulps(v->silu, sample(0.f, FLT_MAX), silu), 4);
  EXPECT_LE(worst_ulps(v->sigmoid, sample(-1.f, -FLT_MIN), sigmoid), 4);
  EXPECT_LE(worst_ulps(v->silu, sample(-1.f, -FLT_MIN), silu), 4);
  EXPECT_LE(worst_ulps(v->sigmoid, sample(-87.f, -1.f), sigmoid), 90);
  EXPECT_LE(worst_ulps(v->silu, sample(-87.f, -1.f), silu), 90);
  const auto s = at(v->sigmoid, {0.f, kInf, -kInf, -FLT_MAX, kNan});
  EXPECT_EQ(s[0], 0.5f);
  EXPECT_EQ(s[1], 1.f);
  EXPECT_EQ(s[2], 0.f);
  EXPECT_EQ(s[3], 0.f);
  EXPECT_TRUE(std::isnan(s[4]));
  const auto y = at(v->silu, {0.f, kInf, -kInf, -FLT_MAX, kNan});
  EXPECT_EQ(y[0], 0.f);
  EXPECT_EQ(y[1], kInf);
  EXPECT_TRUE(std::isnan(y[2]));  // -inf * 0, as in torch
  EXPECT_EQ(y[3], 0.f);
  EXPECT_TRUE(std::isnan(y[4]));
}

template <class T>
void expect_loads_every_pattern(Vectors::Widen load) {
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<float> got(bits.size());
  load(bits.data(), got.data(), static_cast<int64_t>(bits.size()));
  for (size_t i = 0; i < bits.size(); ++i) {
    const T value = {bits[i]};
    const float want = scalar::get(&value);
    if (std::isnan(want))
      EXPECT_TRUE(std::isnan(got[i])) << i;
    else
      EXPECT_EQ(scalar::float_to_bits(got[i]), scalar::float_to_bits(want)) << i;
  }
}

TEST_P(VecTest, Loads16Bits) {
  expect_loads_every_pattern<bf16>(v->load_bf16);
  expect_loads_every_pattern<f16>(v->load_f16);
}

// The 16-bit neighbours of every pattern: below, at and above the middle between two.
template <class T>
void expect_rounds_to_nearest_even(Vectors::Narrow store) {
  std::vector<float> x;
  for (uint32_t i = 0; i < 65536; ++i) {
    const T here = {static_cast<uint16_t>(i)}, next = {static_cast<uint16_t>(i + 1)};
    const float a = scalar::get(&here), b = scalar::get(&next);
    const float middle = 0.5f * a + 0.5f * b;
    for (float f : {a, middle, std::nextafter(middle, a), std::nextafter(middle, b)})
      x.push_back(f);
  }
  for (float f : {65519.f, 65520.f, -65520.f, 3.4e38f, FLT_MAX, kInf, -kInf, kNan}) x.push_back(f);
  while (x.size() % 64 != 0) x.push_back(0.f);
  std::vector<uint16_t> got(x.size());
  store(x.data(), got.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    T want;
    scalar::put(&want, x[i]);
    const T value = {got[i]};
    if (std::isnan(x[i]))
      EXPECT_TRUE(std::isnan(scalar::get(&value))) << x[i];
    else
      EXPECT_EQ(got[i], want.bits) << x[i];
  }
}

TEST_P(VecTest, Stores16BitsRoundedToNearestEven) {
  expect_rounds_to_nearest_even<bf16>(v->store_bf16);
  expect_rounds_to_nearest_even<f16>(v->store_f16);
}

TEST_P(VecTest, PartsTouchNothingBeyond) {
  for (int64_t n = 0; n < v->lanes; ++n) {
    std::vector<float> x = testing::random_floats(n, 1);  // exactly n: ASan sees the rest
    x.reserve(1);                                         // a real address for n = 0 as well
    std::vector<float> y(v->lanes, -1.f);
    v->copy_part(x.data(), y.data(), n);
    for (int64_t i = 0; i < v->lanes; ++i) EXPECT_EQ(y[i], i < n ? x[i] : -1.f);
  }
  for (int64_t n = 1; n <= v->lanes; ++n) {
    const std::vector<float> x = testing::random_floats((n - 1) * 3 + 1, 2);
    std::vector<float> y(x.size(), -1.f);
    v->copy_strided(x.data(), y.data(), 3, n);
    for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(y[i], i % 3 == 0 ? x[i] : -1.f);
  }
}

TEST_P(VecTest, SumAddsHalves) {
  const std::vector<float> x = testing::random_floats(v->lanes, 3);
  std::vector<float> part = x;
  for (int half = v->lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  EXPECT_EQ(v->sum(x.data()), part[0]);
}

}  // namespace
}  // namespace effinfer
