#include "ops/state_copy/state_copy.h"

#include "testing.h"

namespace effinfer {
namespace {

TEST(StateCopyTest, CopiesDenseAndStridedStates) {
  // States of 2 x 3 floats: dense in src, every second column of twice as wide rows in dst.
  const auto src = testing::random_floats(4 * 6, 1);
  std::vector<float> dst(3 * 12, -1.f);
  const std::vector<int32_t> to = {2, -1, 0}, from = {3, 1, 0};
  state_copy({.dst = dst.data(),
              .src = src.data(),
              .dst_slots = to.data(),
              .src_slots = from.data(),
              .count = 3,
              .dst_pool = 3,
              .src_pool = 4,
              .dst_slot = 12 * 4,
              .src_slot = 6 * 4,
              .run = 4,
              .size = {1, 1, 1, 2, 3},
              .dst_stride = {0, 0, 0, 6 * 4, 2 * 4},
              .src_stride = {0, 0, 0, 3 * 4, 4}});
  for (int slot = 0; slot < 3; ++slot)
    for (int i = 0; i < 12; ++i) {
      const int source = slot == 0 ? 0 : 3;
      const bool written = slot != 1 && i % 2 == 0;
      EXPECT_EQ(dst[slot * 12 + i], written ? src[source * 6 + i / 2] : -1.f);
    }
}

}  // namespace
}  // namespace effinfer
