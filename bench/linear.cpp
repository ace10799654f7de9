#include "ops/linear/linear.h"

#include <algorithm>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench {
namespace {

constexpr int64_t kDramBytes = 160 << 20;  // several times any cache
constexpr int64_t kFewRows = 16;

// Packed weights for every case of a type: any finite values will do. Few rows walk through all of
// it, matrix by matrix, so that the weights come from DRAM; many rows stay with the first one.
std::shared_ptr<void> weights(DType type) {
  static std::shared_ptr<void> held[3];
  auto& buffer = held[static_cast<int>(type)];
  if (buffer == nullptr) {
    buffer.reset(std::aligned_alloc(size_t{2} << 20, kDramBytes), std::free);
    advise_huge_pages(buffer.get(), kDramBytes);
    const auto some = values(4096, type);
    const auto* bytes = static_cast<const char*>(some.get());
    const int64_t period = 4096 * size_of(type);
    for (int64_t i = 0; i < kDramBytes; i += period)
      std::copy_n(bytes, period, static_cast<char*>(buffer.get()) + i);
  }
  return buffer;
}

Case linear_case(int64_t rows, int64_t k, int64_t n, DType weight_type) {
  const auto x = values(rows * k), y = values(rows * n);
  const int64_t matrix = n * k * size_of(weight_type);
  const int64_t copies = rows <= kFewRows ? kDramBytes / matrix : 1;
  auto scratch = std::make_shared<std::vector<float>>();
  auto turn = std::make_shared<int64_t>(0);
  return {
      .shape = "R" + std::to_string(rows) + " K" + std::to_string(k) + " N" + std::to_string(n),
      .dtype = weight_type,
      .flops = 2.0 * static_cast<double>(rows) * static_cast<double>(n * k),
      .bytes = static_cast<double>(matrix + rows * (n + k) * size_of(DType::f32)),
      .run =
          [=] {
            const auto packed = weights(weight_type);
            Linear args = {};
            args.x = x.get();
            args.weight = static_cast<const char*>(packed.get()) + (*turn)++ % copies * matrix;
            args.y = y.get();
            args.rows = rows;
            args.n = n;
            args.k = k;
            args.x_stride = k;
            args.y_stride = n;
            args.weight_type = weight_type;
            args.slots = num_threads();
            scratch->resize(std::max(scratch->size(), linear_scratch(args) / sizeof(float)));
            args.scratch = scratch->data();
            linear(args);
          },
  };
}

std::vector<Case> linear_cases() {
  constexpr int64_t kShapes[][2] = {{768, 3072}, {1536, 768}, {2048, 2048}, {4096, 4096}};
  std::vector<Case> cases;
  for (const DType type : {DType::f32, DType::bf16})
    for (const auto& [k, n] : kShapes)
      for (const int64_t rows : {1, 8, 16, 512}) cases.push_back(linear_case(rows, k, n, type));
  return cases;
}

const Registration kLinear("linear", linear_cases);

}  // namespace
}  // namespace effinfer::bench
