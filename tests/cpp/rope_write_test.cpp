#include "ops/rope_write/rope_write.h"

#include "testing.h"

namespace effinfer {
namespace {

class RopeWriteTest : public testing::PerIsa {};
EFFINFER_PER_ISA(RopeWriteTest);

// Three rows of 2 query heads and 1 kv head; the second row writes nothing. Keys go to columns.
void expect_rotated(int64_t dim, int64_t rotary, bool interleaved) {
  constexpr int64_t kRows = 3, kHeads = 3;  // that rotate
  const int64_t width = (kHeads + 1) * dim;
  const auto before = testing::random_floats(kRows * width, 1);
  const auto cos = testing::random_floats(kRows * rotary, 2);
  const auto sin = testing::random_floats(kRows * rotary, 3);
  std::vector<float> qkv = before, k(4 * dim, -7.f), v(4 * dim, -7.f);
  const std::vector<int32_t> slot = {3, -1, 0};
  const WrittenPages k_pages = {k.data(), dim, 0, 2 * dim, 1, 2 * dim, 2, DType::f32};
  const WrittenPages v_pages = {v.data(), dim, 0, 2 * dim, dim, dim, 1, DType::f32};
  rope_write({.qkv = qkv.data(),
              .cos = cos.data(),
              .sin = sin.data(),
              .position = nullptr,
              .slot = slot.data(),
              .plane = nullptr,
              .k = k_pages,
              .v = v_pages,
              .rows = kRows,
              .q_heads = 2,
              .kv_heads = 1,
              .rotary_dim = rotary,
              .lines = kRows,
              .planes = 1,
              .blocks = 2,
              .block_size = 2,
              .qkv_row = width,
              .cos_row = rotary,
              .sin_row = rotary,
              .type = DType::f32,
              .interleaved = interleaved});
  for (int64_t row = 0; row < kRows; ++row)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t d = i % dim, half = rotary / 2, at = row * width + i;
      float want = before[at];
      if (i < kHeads * dim && d < rotary) {
        const bool first = interleaved ? d % 2 == 0 : d < half;
        const int64_t apart = interleaved ? 1 : half;
        const float partner = first ? -before[at + apart] : before[at - apart];
        const volatile float a = before[at] * cos[row * rotary + d];  // rounded before the sum
        const volatile float b = partner * sin[row * rotary + d];
        want = a + b;
      }
      EXPECT_EQ(qkv[at], want) << "row " << row << " element " << i;
    }
  for (int64_t s = 0; s < 4; ++s)
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t row = s == 3 ? 0 : 2;
      const bool written = s == 3 || s == 0;
      EXPECT_EQ(k[s / 2 * 2 * dim + s % 2 + d * 2],
                written ? qkv[row * width + 2 * dim + d] : -7.f);
      EXPECT_EQ(v[s * dim + d], written ? qkv[row * width + 3 * dim + d] : -7.f);
    }
}

TEST_P(RopeWriteTest, RotatesAndWrites) {
  for (bool interleaved : {false, true}) {
    expect_rotated(64, 64, interleaved);
    expect_rotated(20, 6, interleaved);
    expect_rotated(2, 2, interleaved);
  }
}

}  // namespace
}  // namespace effinfer
