#include "ops/rope_write/rope_write.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

constexpr int64_t kRopePageSlots = 16;

Case rope_case(int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t dim, DType type) {
  const int64_t width = (q_heads + 2 * kv_heads) * dim, row = kv_heads * dim;
  const int64_t blocks = (rows + kRopePageSlots - 1) / kRopePageSlots;
  const auto qkv = values(rows * width, type), cos = values(rows * dim), sin = values(rows * dim);
  const auto k = values(blocks * kRopePageSlots * row, type),
             v = values(blocks * kRopePageSlots * row, type);
  const auto slot = std::make_shared<std::vector<int32_t>>();
  for (int64_t i = 0; i < rows; ++i) slot->push_back(static_cast<int32_t>(rows - 1 - i));
  const int64_t block = kRopePageSlots * row, head = kRopePageSlots * dim;
  const WrittenPages k_pages = {k.get(), dim, 0, block, 1, head, kRopePageSlots, type};
  const WrittenPages v_pages = {v.get(), dim, 0, block, dim, head, 1, type};
  return {
      .shape = "rows" + std::to_string(rows) + " h" + std::to_string(q_heads) + "/" +
               std::to_string(kv_heads) + " d" + std::to_string(dim),
      .dtype = type,
      .flops = 3.0 * static_cast<double>(rows * (q_heads + kv_heads) * dim),
      .bytes = static_cast<double>(
          rows * (2 * (q_heads + kv_heads) * dim + 3 * row) * size_of(type) + rows * dim * 8),
      .run =
          [=] {
            rope_write({.qkv = qkv.get(),
                        .cos = floats(cos),
                        .sin = floats(sin),
                        .position = nullptr,
                        .slot = slot->data(),
                        .plane = nullptr,
                        .k = k_pages,
                        .v = v_pages,
                        .rows = rows,
                        .q_heads = q_heads,
                        .kv_heads = kv_heads,
                        .rotary_dim = dim,
                        .lines = rows,
                        .planes = 1,
                        .blocks = blocks,
                        .block_size = kRopePageSlots,
                        .qkv_row = width,
                        .cos_row = dim,
                        .sin_row = dim,
                        .type = type,
                        .interleaved = false});
          },
  };
}

std::vector<Case> rope_cases() {
  return {rope_case(1, 8, 8, 64, DType::f32), rope_case(16, 8, 8, 64, DType::f32),
          rope_case(512, 32, 8, 128, DType::f32), rope_case(512, 32, 8, 128, DType::bf16)};
}

const Registration kRopeWrite("rope_write", rope_cases);

}  // namespace
}  // namespace effinfer::bench
