#include "ops/selective_scan_lmu/selective_scan_lmu.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// chunk 1: every memory is kept; more: only the last.
Case lmu_case(int64_t length, int64_t dim, int64_t state, int64_t chunk, DType type) {
  SelectiveScanLmu args = {};
  args.batch = 1;
  args.dim = dim;
  args.length = length;
  args.state = state;
  args.chunk = chunk;
  const auto u = values(length * dim, type), last = values(dim * state);
  const auto memories = values(chunk == 1 ? dim * length * state : 0, type);
  const float largest = 1.f / static_cast<float>(state);  // so that memories stay small
  const auto transition =
      values(args.panels() * args.inner() * kLmuPanel, DType::f32, -largest, largest);
  args.u = {u.get(), 0, 1, dim, type};
  args.transition = floats(transition);
  args.memories = chunk == 1 ? memories.get() : nullptr;
  args.last_state = floats(last);
  const auto elements = static_cast<double>(length * dim);
  return {
      .shape = "L" + std::to_string(length) + " D" + std::to_string(dim) + " N" +
               std::to_string(state) + " chunk " + std::to_string(chunk),
      .dtype = type,
      .flops =
          elements / static_cast<double>(chunk) * 2.0 * static_cast<double>(state * args.inner()),
      .bytes = elements * static_cast<double>(size_of(type)) *
               static_cast<double>(chunk == 1 ? state + 1 : 1),
      .run =
          [=, owned = std::vector{u, transition, memories, last}]() mutable {
            thread_local std::vector<float> scratch;
            scratch.resize(static_cast<size_t>(selective_scan_lmu_scratch(args)) / sizeof(float));
            args.scratch = scratch.data();
            selective_scan_lmu(args);
          },
  };
}

std::vector<Case> lmu_cases() {
  return {lmu_case(784, 24, 256, 1, DType::f32), lmu_case(784, 1, 256, 1, DType::f32),
          lmu_case(1024, 96, 64, 1, DType::f32), lmu_case(1024, 96, 256, 64, DType::f32)};
}

const Registration kSelectiveScanLmu("selective_scan_lmu", lmu_cases);

}  // namespace
}  // namespace effinfer::bench
