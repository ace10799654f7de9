#include "ops/paged_attention/paged_attention.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench {
namespace {

constexpr int64_t kPageSlots = 16;

struct Heads {
  int64_t q, kv, dim;
};

// `count` sequences of `length` tokens in shuffled pages, the last `rows` of each as queries.
Case paged_attention_case(const std::string& what, int64_t count, int64_t length, int64_t rows,
                          Heads heads, DType type) {
  const int64_t pages = (length + kPageSlots - 1) / kPageSlots, blocks = count * pages;
  const int64_t total = count * rows, row = heads.kv * heads.dim, head = kPageSlots * heads.dim;
  const auto q = values(total * heads.q * heads.dim, type),
             out = values(total * heads.q * heads.dim, type);
  const auto k = values(blocks * kPageSlots * row, type),
             v = values(blocks * kPageSlots * row, type);
  struct Indices {
    std::vector<int32_t> table, sequence, position;
  };
  const auto at = std::make_shared<Indices>();
  at->table.resize(static_cast<size_t>(blocks));
  std::iota(at->table.begin(), at->table.end(), 0);
  std::shuffle(at->table.begin(), at->table.end(), std::mt19937(1));
  double keys = 0;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t t = length - rows; t < length; ++t) {
      at->sequence.push_back(static_cast<int32_t>(s));
      at->position.push_back(static_cast<int32_t>(t));
      keys += static_cast<double>(t + 1);
    }
  PagedAttention args = {
      .q = q.get(),
      .k_pages = k.get(),
      .v_pages = v.get(),
      .block_table = at->table.data(),
      .sequence = at->sequence.data(),
      .position = at->position.data(),
      .plane = nullptr,
      .out = out.get(),
      .rows = total,
      .q_heads = heads.q,
      .kv_heads = heads.kv,
      .k_dim = heads.dim,
      .v_dim = heads.dim,
      .planes = 1,
      .blocks = blocks,
      .block_size = kPageSlots,
      .sequences = count,
      .max_blocks = pages,
      .q_row = heads.q * heads.dim,
      .q_head = heads.dim,
      .out_row = heads.q * heads.dim,
      .out_head = heads.dim,
      .table_row = pages,
      .k_stride = {0, kPageSlots * row, 1, head, kPageSlots},
      .v_stride = {0, kPageSlots * row, heads.dim, head, 1},
      .q_type = type,
      .k_type = type,
      .v_type = type,
      .scale = 0.125f,
      .softcap = 0.f,
      .window = 0,
      .slots = 0,
      .scratch = nullptr,
  };
  const auto scratch = std::make_shared<std::shared_ptr<void>>();
  const double read = static_cast<double>(count * length * row * 2 * size_of(type));
  return {
      .shape = what + " " + std::to_string(count) + "x" + std::to_string(length) + " h" +
               std::to_string(heads.q) + "/" + std::to_string(heads.kv) + " d" +
               std::to_string(heads.dim),
      .dtype = type,
      .flops = 4.0 * keys * static_cast<double>(heads.q * heads.dim),
      .bytes = read + static_cast<double>(2 * total * heads.q * heads.dim * size_of(type)),
      .run =
          [=]() mutable {
            if (args.slots != num_threads()) {  // the harness changes it between cases
              args.slots = num_threads();
              *scratch = values(static_cast<int64_t>(paged_attention_scratch(args) / 4 + 1));
              args.scratch = scratch->get();
            }
            // q, k, v, out and the indices live as long as this case
            static_cast<void>(q), static_cast<void>(k), static_cast<void>(v);
            static_cast<void>(out), static_cast<void>(at);
            paged_attention(args);
          },
  };
}

std::vector<Case> paged_attention_cases() {
  constexpr Heads kSame = {8, 8, 64}, kGrouped = {32, 8, 128};
  return {paged_attention_case("prompt", 1, 512, 512, kSame, DType::f32),
          paged_attention_case("prompt", 1, 512, 512, kGrouped, DType::f32),
          paged_attention_case("decode", 1, 16384, 1, kSame, DType::f32),
          paged_attention_case("decode", 16, 1024, 1, kSame, DType::f32),
          paged_attention_case("decode", 16, 1024, 1, kSame, DType::bf16),
          paged_attention_case("decode", 8, 2048, 1, kGrouped, DType::bf16)};
}

const Registration kPagedAttention("paged_attention", paged_attention_cases);

}  // namespace
}  // namespace effinfer::bench
