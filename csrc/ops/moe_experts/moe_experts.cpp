#include "ops/moe_experts/moe_experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/parallel.h"
#include "ops/linear/tasks.h"

namespace effinfer {
namespace {

constexpr Kernel<MoeExpertsFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, moe_experts_avx512},
    {"avx2", kAvx2, moe_experts_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, moe_experts_neon},
#endif
    {"scalar", kScalar, moe_experts_scalar},
};

constexpr int64_t kGrainElements = 1 << 15;  // about 5 us: less is not worth waking a thread
constexpr int64_t kTasksPerSlot = 4;         // enough for a slow thread to be made up for

int64_t block_rows(const MoeExperts& a) {
  const int64_t most =
      std::max<int64_t>(1, MoeExperts::kBlockPairs / std::max<int64_t>(1, a.top_k));
  return std::min(a.rows, most);
}

// The product of one half with all pairs as its rows, for one expert.
Linear up_product(const MoeExperts& a) {
  Linear l = {};
  l.x = a.scratch.rows;
  l.weight = a.up;
  l.y = a.scratch.inner;
  l.n = a.up_outputs();
  l.k = a.dim;
  l.x_stride = a.dim;
  l.y_stride = l.n;
  l.x_type = DType::f32;
  l.weight_type = a.up_type;
  l.slots = 1;
  return l;
}

Linear down_product(const MoeExperts& a) {
  Linear l = {};
  l.x = a.scratch.inner;
  l.weight = a.down;
  l.y = a.scratch.rows;
  l.n = a.dim;
  l.k = a.inner;
  l.x_stride = a.up_outputs();
  l.y_stride = a.dim;
  l.x_type = DType::f32;
  l.weight_type = a.down_type;
  l.slots = 1;
  return l;
}

// Floats that suffice for a task, however many of `rows` rows are an expert's.
int64_t most_scratch(Linear l, int64_t rows) {
  int64_t most = 0;
  for (l.rows = 1; l.rows <= std::min(rows, linear_layout::kMaxRows); ++l.rows)
    most = std::max(most, linear_scratch_per_slot(l, linear_cut(l)));
  return most;
}

// A counting sort of the pairs by expert.
void sort_pairs(const MoeExperts& a) {
  const MoeScratch& s = a.scratch;
  const int64_t pairs = a.rows * a.top_k;
  std::fill_n(s.starts, a.experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) ++s.starts[a.index[p] + 1];
  for (int64_t e = 0; e < a.experts; ++e) s.starts[e + 1] += s.starts[e];
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t at = s.starts[a.index[p]]++;
    s.pair[at] = static_cast<int32_t>(p);
    s.place[p] = at;
  }
  // Each start has moved to the next expert's.
  std::memmove(s.starts + 1, s.starts, static_cast<size_t>(a.experts) * sizeof(int32_t));
  s.starts[0] = 0;
}

// Expert e's share of a product over all places.
Linear product_of(const MoeExperts& a, Linear l, int64_t e) {
  const int64_t first = a.scratch.starts[e], panels = linear_layout::panels(l);
  l.rows = a.scratch.starts[e + 1] - first;
  l.x = static_cast<const float*>(l.x) + first * l.x_stride;
  l.y = static_cast<float*>(l.y) + first * l.y_stride;
  l.weight = static_cast<const char*>(l.weight) +
             e * panels * l.k * linear_layout::kPanel * size_of(l.weight_type);
  return l;
}

// All experts' products, their tasks in one list that the threads claim from.
void multiply(const MoeExperts& a, Linear all) {
  constexpr int64_t kWorthThreads = 1 << 18;  // multiply-adds, as for linear
  const MoeScratch& s = a.scratch;
  int64_t active = 0;
  for (int64_t e = 0; e < a.experts; ++e) active += s.starts[e + 1] > s.starts[e];
  if (active == 0) return;
  // Many experts are tasks enough; a few are cut for the threads that share each.
  if (a.slots > 1) all.slots = (a.slots * kTasksPerSlot + active - 1) / active;
  s.tasks[0] = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    int64_t tasks = 0;
    if (s.starts[e + 1] > s.starts[e]) {
      const LinearCut c = linear_cut(product_of(a, all, e));
      tasks = c.row_parts * c.panel_parts;
    }
    s.tasks[e + 1] = s.tasks[e] + static_cast<int32_t>(tasks);
  }
  const auto run = linear_kernel().run;
  std::atomic<int32_t> next{0};
  const int32_t tasks = s.tasks[a.experts];
  auto work = [&](int64_t slot, int64_t) {
    for (int32_t t = next++; t < tasks; t = next++) {
      const int64_t e = std::upper_bound(s.tasks, s.tasks + a.experts + 1, t) - s.tasks - 1;
      const Linear l = product_of(a, all, e);
      const LinearCut c = linear_cut(l);
      const int64_t own = t - s.tasks[e];
      const int64_t row = own % c.row_parts * c.rows, panel = own / c.row_parts * c.panels;
      run(l, {row, std::min(c.rows, l.rows - row), panel,
              std::min(c.panels, linear_layout::panels(l) - panel), c.x_blocks,
              s.linear + slot * s.linear_floats});
    }
  };
  if (a.slots <= 1 || a.rows * a.top_k * all.n * all.k < kWorthThreads)
    work(0, 0);
  else
    parallel_for(std::min<int64_t>(a.slots, tasks), work);
}

void run_block(const MoeExperts& a) {
  const auto run = moe_experts_kernel().run;
  const auto over = [&](MoePart part, int64_t items, int64_t elements) {
    parallel_ranges(items, 1 + kGrainElements / std::max<int64_t>(1, elements),
                    [&](int64_t begin, int64_t end, int64_t) { run(a, part, begin, end); });
  };
  const int64_t pairs = a.rows * a.top_k;
  sort_pairs(a);
  over(MoePart::gather, pairs, a.dim);
  multiply(a, up_product(a));
  over(MoePart::activate, pairs, a.up_outputs());
  multiply(a, down_product(a));
  over(MoePart::combine, a.rows, a.top_k * a.dim);
}

}  // namespace

const Kernel<MoeExpertsFn>& moe_experts_kernel() { return pick(kKernels); }

size_t moe_experts_scratch(MoeExperts& a, void* memory) {
  const int64_t rows = block_rows(a), pairs = rows * a.top_k;
  auto* at = static_cast<char*>(memory);
  size_t taken = 0;
  const auto take = [&]<class T>(T*& place, int64_t count) {
    constexpr size_t kLine = 64;
    place = at != nullptr ? reinterpret_cast<T*>(at + taken) : nullptr;
    taken += (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
  };
  MoeScratch& s = a.scratch;
  s.linear_floats =
      (std::max(most_scratch(up_product(a), rows), most_scratch(down_product(a), rows)) + 15) / 16 *
      16;
  take(s.rows, pairs * a.dim);
  take(s.inner, pairs * a.up_outputs());
  take(s.starts, a.experts + 1);
  take(s.pair, pairs);
  take(s.place, pairs);
  take(s.tasks, a.experts + 1);
  take(s.linear, a.slots * s.linear_floats);
  return taken;
}

void moe_experts(const MoeExperts& args) {
  MoeExperts block = args;
  for (int64_t row = 0; row < args.rows; row += block.rows) {
    block.rows = std::min(block_rows(args), args.rows - row);
    const int64_t size = size_of(args.x_type);
    block.x = static_cast<const char*>(args.x) + row * args.x_stride * size;
    block.y = static_cast<char*>(args.y) + row * args.y_stride * size;
    block.index = args.index + row * args.top_k;
    block.weights = args.weights + row * args.top_k;
    run_block(block);
  }
}

}  // namespace effinfer
