#include "ops/lowbit_linear/lowbit_linear.h"

#include "base/thread_pool.h"
#include "emulated/lowbit_int8.h"
#include "testing.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;
using testing::random_floats;

class LowbitLinearTest : public testing::PerIsa {};
EFFINFER_PER_ISA(LowbitLinearTest);

constexpr LowbitFormat kFormats[] = {
    LowbitFormat::int8,    LowbitFormat::int4,          LowbitFormat::int3,  LowbitFormat::int2,
    LowbitFormat::ternary, LowbitFormat::ternary_dense, LowbitFormat::binary};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed weights of random bits, or all of one byte: every pattern is one, but for magnitudes of
// ternary_dense, at most 13, and the codes of ternary, at most 2.
std::vector<uint8_t> random_packed(LowbitFormat f, size_t bytes, unsigned seed) {
  const lowbit::Layout l = lowbit::layout(f);
  std::mt19937 engine(seed);
  std::vector<uint8_t> out(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    uint8_t byte = static_cast<uint8_t>(engine());
    if (f == LowbitFormat::ternary_dense && i % l.unit_bytes < 128)
      byte = static_cast<uint8_t>(byte % 14 | (byte / 14 % 14) << 4);
    if (f == LowbitFormat::ternary) byte &= static_cast<uint8_t>(~(byte << 1 & 0xaa));
    out[i] = byte;
  }
  return out;
}

// As kernels want it: 64 bytes.
float* aligned(std::vector<float>& scratch) {
  const auto start = reinterpret_cast<uintptr_t>(scratch.data());
  return reinterpret_cast<float*>((start + 63) / 64 * 64);
}

// One layer on random x; guards between the rows of y.
struct Problem {
  LowbitFormat format;
  int64_t rows, n, k, group;
  bool affine = true;
  Epilogue epilogue = Epilogue::none;
  lowbit::Layout layout = lowbit::layout(format);
  int64_t panels = ceil_div(n, kPanel) * (takes_two(epilogue) ? 2 : 1);
  int64_t groups = ceil_div(k, group), units = ceil_div(k, layout.unit_k);
  std::vector<uint8_t> packed = random_packed(format, panels* units* layout.unit_bytes, 1);
  std::vector<float> x = random_floats(rows * (k + 3), 2);
  std::vector<float> scale = random_floats(panels * groups * kPanel, 3);
  std::vector<float> offset = random_floats(panels * groups * kPanel, 4);
  std::vector<float> bias = random_floats(2 * n, 5);
  std::vector<uint8_t> zero = [this] {
    std::mt19937 engine(6);
    std::vector<uint8_t> out(panels * groups * kPanel);
    for (uint8_t& z : out) z = static_cast<uint8_t>(engine() % (layout.max_code + 1));
    return out;
  }();

  template <class Run>
  std::vector<float> run_by(int64_t slots, Run&& run_with) {
    std::vector<float> y(rows * (n + 2), 7.f);
    LowbitLinear a = {};
    a.io.x = x.data();
    a.io.bias = bias.data();
    a.io.y = y.data();
    a.io.rows = rows;
    a.io.n = n;
    a.io.k = k;
    a.io.x_stride = k + 3;
    a.io.y_stride = n + 2;
    a.io.epilogue = epilogue;
    a.io.slots = slots;
    a.weight = {.packed = packed.data(),
                .scale = scale.data(),
                .zero = affine && layout.step == 1 ? zero.data() : nullptr,
                .offset = affine ? offset.data() : nullptr,
                .panel_stride = units * layout.unit_bytes,
                .scale_stride = groups * kPanel,
                .group = group,
                .scale_type = DType::f32,
                .format = format};
    a.int8_activations = true;
    run_with(a);
    return y;
  }
  std::vector<float> run(int64_t slots = 1) {
    return run_by(slots, [](LowbitLinear& a) {
      std::vector<float> scratch(lowbit_linear_scratch(a) / sizeof(float) + 16);
      a.io.scratch = aligned(scratch);
      lowbit_linear(a);
    });
  }
  std::vector<float> by_scalar() {
    const std::string isa = isa_name();
    set_isa_cap("scalar");
    std::vector<float> y = run();
    set_isa_cap(isa.c_str());
    return y;
  }
};

// Every format's groups, tails of k and n, and heights of a tile.
TEST_P(LowbitLinearTest, Int8HasTheScalarKernelsBits) {
  for (const LowbitFormat format : kFormats) {
    const bool dense = format == LowbitFormat::ternary_dense;
    const int64_t step = lowbit::group_step(format);
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13})
      for (const int64_t k : {1, 68, 520}) {
        for (const int64_t group : {step, 3 * step, int64_t{1000}}) {
          Problem p{.format = format, .rows = rows, .n = 37, .k = k, .group = dense ? k : group};
          p.affine = group != step;
          EXPECT_EQ(p.run(), p.by_scalar())
              << static_cast<int>(format) << ", " << rows << " rows, k = " << k << ", " << group;
          if (dense) break;
        }
      }
  }
}

// Codes and x at their largest, so that a sum that is flushed too late would wrap.
TEST_P(LowbitLinearTest, LargestSumsDoNotWrap) {
  constexpr int64_t kLong = 4096;
  for (const LowbitFormat format : kFormats)
    for (const int64_t rows : {1, 6})
      for (const bool largest : {false, true}) {
        Problem p{.format = format, .rows = rows, .n = 16, .k = kLong, .group = kLong};
        p.affine = false;
        uint8_t byte = largest ? 0xff : 0;
        if (format == LowbitFormat::int8) byte = largest ? 0x7f : 0x80;
        if (format == LowbitFormat::ternary && largest) byte = 0xaa;
        if (format == LowbitFormat::ternary_dense) byte = largest ? 0xdd : 0;
        std::fill(p.packed.begin(), p.packed.end(), byte);
        std::fill(p.x.begin(), p.x.end(), 1.f);
        EXPECT_EQ(p.run(), p.by_scalar()) << static_cast<int>(format) << ", " << rows << " rows";
        std::fill(p.x.begin(), p.x.end(), -1.f);
        EXPECT_EQ(p.run(), p.by_scalar()) << static_cast<int>(format) << ", " << rows << " rows";
      }
}

// The largest codes times runs of the largest x of either sign, of lengths around those that 16
// bits still hold, wherever they begin: one k too many in a sum and it would wrap.
TEST_P(LowbitLinearTest, SumsAroundTheLimitOf16BitsDoNotWrap) {
  constexpr int64_t kRows = 5, kK = 256;
  for (const LowbitFormat format : {LowbitFormat::int4, LowbitFormat::int3})
    for (const int64_t group : {64, 96, 256})
      for (const float sign : {1.f, -1.f})
        for (int64_t length = 14; length < 68; length += 3) {
          Problem p{.format = format, .rows = kRows, .n = 16, .k = kK, .group = group};
          p.affine = false;
          std::fill(p.packed.begin(), p.packed.end(), 0xff);
          std::fill(p.x.begin(), p.x.end(), 0.f);
          for (int64_t r = 0; r < kRows; ++r) {
            float* const row = p.x.data() + r * (kK + 3);
            for (int64_t i = 0; i < length; ++i) {
              row[9 * r + i] = sign;
              row[120 + (i & ~1) + i] = sign;  // every other pair
            }
          }
          EXPECT_EQ(p.run(), p.by_scalar()) << static_cast<int>(format) << ", groups of " << group
                                            << ", " << length << " times " << sign;
        }
}

TEST_P(LowbitLinearTest, RowsAndThreadsDoNotChangeABit) {
  for (const LowbitFormat format : kFormats) {
    Problem all{.format = format, .rows = 29, .n = 150, .k = 288, .group = 288};
    const std::vector<float> y = all.run();
    set_pool(thread_pool(3));
    EXPECT_EQ(all.run(3), y) << static_cast<int>(format);
    set_pool(nullptr);
    for (const int64_t rows : {1, 5, 12}) {
      Problem some{.format = format, .rows = rows, .n = 150, .k = 288, .group = 288};
      const std::vector<float> first = some.run();
      EXPECT_TRUE(std::equal(first.begin(), first.end(), y.begin()))
          << static_cast<int>(format) << ", " << rows << " rows";
    }
  }
}

#if defined(__x86_64__)
// The AVX-512 VNNI kernel's text, but for two functions of a few instructions.
TEST(LowbitLinearEmulated, Avx512VnniHasTheScalarKernelsBits) {
  ASSERT_TRUE(set_isa_cap("avx2"));
  if (std::string(isa_name()) != "avx2") GTEST_SKIP() << "this CPU has no avx2";
  for (const LowbitFormat format : kFormats)
    for (const int64_t rows : {1, 4, 5, 13})
      for (const int64_t k : {20, 580}) {
        const bool whole = format == LowbitFormat::ternary_dense || k < 96;
        Problem p{.format = format, .rows = rows, .n = 37, .k = k, .group = whole ? k : 96};
        const std::vector<float> got = p.run_by(1, [&](LowbitLinear& a) {
          const int64_t stride = ceil_div(k, 192) * 192 + 64;
          std::vector<int8_t> codes(rows * stride);
          std::vector<float> scale(rows), scratch(lowbit_int8_scratch(rows) + 16);
          std::vector<int32_t> sums(rows * p.groups);
          const LowbitRows q = {codes.data(), scale.data(), sums.data(), stride,
                                p.groups,     nullptr,      0,           nullptr};
          lowbit_quantize_scalar(a, q, 0, rows);
          lowbit_int8_emulated_avx2(a, q, {0, rows, 0, p.panels, 1, aligned(scratch)});
        });
        EXPECT_EQ(got, p.by_scalar()) << static_cast<int>(format) << ", " << rows << " rows";
      }
  set_isa_cap("");
}
#endif

}  // namespace
}  // namespace effinfer
