#include "ops/state_copy/state_copy.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// Every state of a pool of `slots` into another pool, in reverse order.
Case copy_case(int64_t slots, int64_t elements) {
  const auto src = values(slots * elements), dst = values(slots * elements);
  std::vector<int32_t> to(slots), from(slots);
  for (int32_t i = 0; i < slots; ++i) {
    to[i] = i;
    from[i] = static_cast<int32_t>(slots) - 1 - i;
  }
  return {
      .shape = "S" + std::to_string(slots) + " of " + std::to_string(elements * 4 / 1024) + " KiB",
      .dtype = DType::f32,
      .flops = 0,
      .bytes = 2.0 * static_cast<double>(slots * elements * 4),
      .run =
          [=] {
            state_copy({.dst = dst.get(),
                        .src = src.get(),
                        .dst_slots = to.data(),
                        .src_slots = from.data(),
                        .count = slots,
                        .dst_pool = slots,
                        .src_pool = slots,
                        .dst_slot = elements * 4,
                        .src_slot = elements * 4,
                        .run = elements * 4,
                        .size = {1, 1, 1, 1, 1},
                        .dst_stride = {},
                        .src_stride = {}});
          },
  };
}

std::vector<Case> copy_cases() { return {copy_case(8, 1536 * 16), copy_case(64, 24 * 64 * 128)}; }

const Registration kCopy("state_copy", copy_cases);

}  // namespace
}  // namespace effinfer::bench
