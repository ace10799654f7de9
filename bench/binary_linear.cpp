#include "ops/binary_linear/binary_linear.h"

#include <algorithm>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench::binary {
namespace {

using namespace binary_layout;

constexpr int64_t kDramBytes = 160 << 20;  // several times any cache
constexpr int64_t kFewRows = 16;

// Packed weights for every case: any bits will do. Few rows walk through all of them, matrix by
// matrix, so that the weights come from DRAM; many rows stay with the first one.
const uint8_t* weights() {
  static const std::shared_ptr<void> held = [] {
    std::shared_ptr<void> buffer(std::aligned_alloc(size_t{2} << 20, kDramBytes), std::free);
    advise_huge_pages(buffer.get(), kDramBytes);
    auto* words = static_cast<uint32_t*>(buffer.get());
    uint32_t state = 1;
    for (int64_t i = 0; i < kDramBytes / 4; ++i) words[i] = state = state * 1664525u + 1013904223u;
    return buffer;
  }();
  return static_cast<const uint8_t*>(held.get());
}

Case binary_case(int64_t rows, int64_t k, int64_t n) {
  const auto x = values(rows * k), y = values(rows * n), scale = values(n);
  const int64_t panel = bytes_of(k) * kOutputs, matrix = panels_of(n) * panel;
  const int64_t copies = rows <= kFewRows ? kDramBytes / matrix : 1;
  auto scratch = std::make_shared<std::vector<char>>();
  auto turn = std::make_shared<int64_t>(0);
  return {
      .shape = "R" + std::to_string(rows) + " K" + std::to_string(k) + " N" + std::to_string(n),
      .dtype = DType::f32,
      .flops = 2.0 * static_cast<double>(rows) * static_cast<double>(n * k),
      .bytes = static_cast<double>(matrix + rows * (n + k) * size_of(DType::f32)),
      .run =
          [=] {
            BinaryLinear args = {};
            args.x = x.get();
            args.weight = weights() + (*turn)++ % copies * matrix;
            args.weight_scale = floats(scale);
            args.y = y.get();
            args.rows = rows;
            args.n = n;
            args.k = k;
            args.panel_stride = panel;
            args.x_stride = k;
            args.y_stride = n;
            args.mean_scale = true;
            args.slots = num_threads();
            scratch->resize(std::max(scratch->size(), binary_linear_scratch(args) + 64));
            const auto at = reinterpret_cast<uintptr_t>(scratch->data());
            args.scratch = reinterpret_cast<void*>((at + 63) / 64 * 64);
            binary_linear(args);
          },
  };
}

std::vector<Case> binary_linear_cases() {
  constexpr int64_t kShapes[][2] = {{768, 3072}, {4096, 4096}, {4096, 11008}};
  std::vector<Case> cases;
  for (const auto& [k, n] : kShapes)
    for (const int64_t rows : {1, 2, 4, 8, 16, 128, 512}) cases.push_back(binary_case(rows, k, n));
  return cases;
}

const Registration kBinaryLinear("binary_linear", binary_linear_cases);

}  // namespace
}  // namespace effinfer::bench::binary
