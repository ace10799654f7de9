#include "base/cpu.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

namespace effinfer {
namespace {

// The caps below only ever take bits away, so they hold on every machine.
class CpuTest : public ::testing::Test {
 protected:
  void TearDown() override {
    set_isa_cap("");
    unsetenv("EFFINFER_ISA");
  }
};

TEST_F(CpuTest, CapsOnlyTakeAway) {
  ASSERT_TRUE(set_isa_cap(""));
  const uint32_t all = isa_bits();
  for (const char* name : {"avx512vnni", "avx512", "avx2", "i8mm", "dotprod", "neon", "scalar"}) {
    ASSERT_TRUE(set_isa_cap(name)) << name;
    EXPECT_EQ(isa_bits() & ~all, 0u) << name;
  }
  EXPECT_EQ(isa_bits(), 0u);
  EXPECT_STREQ(isa_name(), "scalar");
  ASSERT_TRUE(set_isa_cap(""));
  EXPECT_EQ(isa_bits(), all);
}

TEST_F(CpuTest, AnotherArchitecturesNameCapsToScalar) {
#if defined(__x86_64__)
  ASSERT_TRUE(set_isa_cap("neon"));
#else
  ASSERT_TRUE(set_isa_cap("avx2"));
#endif
  EXPECT_STREQ(isa_name(), "scalar");
}

TEST_F(CpuTest, AnUnknownNameChangesNothing) {
  ASSERT_TRUE(set_isa_cap("scalar"));
  EXPECT_FALSE(set_isa_cap("sse9"));
  EXPECT_STREQ(isa_name(), "scalar");
}

TEST_F(CpuTest, TheEnvironmentIsChecked) {
  EXPECT_EQ(isa_env_error(), nullptr);
  setenv("EFFINFER_ISA", "scalar", 1);
  EXPECT_EQ(isa_env_error(), nullptr);
  setenv("EFFINFER_ISA", "fast", 1);
  EXPECT_STREQ(isa_env_error(), "fast");
}

TEST_F(CpuTest, PickTakesTheFirstRowThatRuns) {
  using Fn = int (*)();
  constexpr Kernel<Fn> kTable[] = {
      {"best", kAvx2 | kNeon, [] { return 2; }},  // no CPU has both
      {"scalar", kScalar, [] { return 1; }},
  };
  EXPECT_STREQ(pick(kTable).isa, "scalar");
  EXPECT_EQ(pick(kTable).run(), 1);
}

}  // namespace
}  // namespace effinfer
