// Shared by the native tests: random data, error measures, and a run per instruction set.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/scalar.h"

namespace effinfer::testing {

inline std::vector<float> random_floats(size_t n, unsigned seed, float scale = 1.f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.f, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(engine);
  return v;
}

template <class T>
std::vector<T> to_type(const std::vector<float>& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) scalar::put(&out[i], values[i]);
  return out;
}

template <class T>
double relative_error(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = double{scalar::get(&got[i])} - want[i];
    error += d * d;
    scale += want[i] * want[i];
  }
  return scale > 0 ? std::sqrt(error / scale) : std::sqrt(error);
}

// A fixture parametrized over instruction sets; a set this CPU lacks is skipped by name.
class PerIsa : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    ASSERT_TRUE(set_isa_cap(GetParam()));
    if (std::string(isa_name()) != GetParam()) GTEST_SKIP() << "this CPU has no " << GetParam();
  }
  void TearDown() override { set_isa_cap(""); }
};

inline std::string isa_label(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

#if defined(__aarch64__)
#define EFFINFER_ISAS "scalar", "neon", "dotprod", "i8mm"
#else
#define EFFINFER_ISAS "scalar", "avx2", "avx512", "avx512vnni"
#endif
#define EFFINFER_PER_ISA(Suite)                                          \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, ::testing::Values(EFFINFER_ISAS), \
                           ::effinfer::testing::isa_label)

}  // namespace effinfer::testing
