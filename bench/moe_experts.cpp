#include "ops/moe_experts/moe_experts.h"

#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench {
namespace {

// Rows that take their experts in turns, as a balanced router would have it.
Case mixture_case(int64_t rows, int64_t dim, int64_t inner, int64_t experts, int64_t top_k,
                  DType type) {
  MoeExperts args = {};
  args.rows = rows;
  args.dim = args.x_stride = args.y_stride = dim;
  args.inner = inner;
  args.top_k = top_k;
  args.experts = experts;
  args.x_type = DType::f32;
  args.up_type = args.down_type = type;
  args.gated = true;
  args.slots = num_threads();
  const int64_t pairs = rows * top_k;
  const auto x = values(rows * dim), y = values(rows * dim), weights = values(pairs);
  const auto up = values(experts * 2 * inner * dim, type, -0.05f, 0.05f);
  const auto down = values(experts * dim * inner, type, -0.05f, 0.05f);
  std::vector<int32_t> index(pairs);
  for (int64_t p = 0; p < pairs; ++p) index[p] = static_cast<int32_t>(p % experts);
  const auto scratch = values(static_cast<int64_t>(moe_experts_scratch(args, nullptr) / 4) + 16);
  const double per_expert = 3.0 * static_cast<double>(dim * inner);
  return {
      .shape = "R" + std::to_string(rows) + " D" + std::to_string(dim) + " I" +
               std::to_string(inner) + " E" + std::to_string(experts) + " top" +
               std::to_string(top_k),
      .dtype = type,
      .flops = 2.0 * static_cast<double>(pairs) * per_expert,
      .bytes = static_cast<double>(std::min(pairs, experts) * size_of(type)) * per_expert +
               8.0 * static_cast<double>(rows * dim),
      .run =
          [=]() mutable {
            args.x = x.get();
            args.index = index.data();
            args.weights = floats(weights);
            args.up = up.get();
            args.down = down.get();
            args.y = y.get();
            moe_experts_scratch(args, scratch.get());
            moe_experts(args);
          },
  };
}

std::vector<Case> mixture_cases() {
  return {
      mixture_case(1, 768, 256, 32, 4, DType::f32), mixture_case(8, 768, 256, 32, 4, DType::f32),
      mixture_case(64, 768, 256, 32, 4, DType::f32), mixture_case(64, 768, 256, 32, 4, DType::bf16),
      mixture_case(64, 768, 1024, 8, 2, DType::f32)};
}

const Registration kMoeExperts("moe_experts", mixture_cases);

}  // namespace
}  // namespace effinfer::bench
