#include "ops/low_rank_add/low_rank_add.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// What the loops of a block add to a product of k by n: rows at `loops` depths, sorted by depth.
Case addition_case(int64_t rows, int64_t k, int64_t n, int64_t rank, int64_t loops, DType type) {
  LowRankAdd args = {};
  args.parts[0] = {n, rank};
  args.part_count = 1;
  args.rows = rows;
  args.k = args.x_stride = k;
  args.n = args.y_stride = n;
  args.rank = rank;
  args.up_size = args.panels() * rank * LowRankAdd::kPanel;
  args.x_type = DType::f32;
  args.weight_type = type;
  const auto x = values(rows * k), y = values(rows * n), low = values(rows * rank);
  const auto down = values(loops * rank * k, type);
  const auto up = values(loops * args.up_size, type, -1e-3f, 1e-3f);  // y adds up, run after run
  std::vector<int32_t> index(rows);
  for (int64_t i = 0; i < rows; ++i) index[i] = static_cast<int32_t>(i * loops / rows);
  const auto present = static_cast<double>(loops < rows ? loops : rows);
  const auto pair = static_cast<double>(rank * k + args.up_size);
  return {
      .shape = "R" + std::to_string(rows) + " K" + std::to_string(k) + " N" + std::to_string(n) +
               " r" + std::to_string(rank) + " G" + std::to_string(loops),
      .dtype = type,
      .flops = 2.0 * static_cast<double>(rows * rank * (k + n)),
      .bytes = present * pair * size_of(type) + 4.0 * static_cast<double>(rows * (k + 2 * n)),
      .run =
          [=]() mutable {
            args.x = x.get();
            args.index = index.data();
            args.down = down.get();
            args.up = up.get();
            args.y = y.get();
            args.low = floats(low);
            low_rank_add(args);
          },
  };
}

std::vector<Case> addition_cases() {
  return {addition_case(1, 512, 1536, 26, 4, DType::f32),
          addition_case(8, 512, 1536, 26, 4, DType::f32),
          addition_case(64, 512, 1536, 26, 4, DType::f32),
          addition_case(64, 512, 1536, 26, 4, DType::bf16)};
}

const Registration kLowRankAdd("low_rank_add", addition_cases);

}  // namespace
}  // namespace effinfer::bench
