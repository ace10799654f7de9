#include "ops/paged_attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/parallel.h"
#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

constexpr Kernel<PagedAttentionFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, paged_attention_avx512},
    {"avx2", kAvx2, paged_attention_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, paged_attention_neon},
#endif
    {"scalar", kScalar, paged_attention_scalar},
};

constexpr int64_t kGrainProducts = 300000;  // about 10 us: less is not worth waking a thread
constexpr int64_t kTasksPerSlot = 2;        // enough for a slow worker to be made up for

struct Tile {
  int32_t row, rows;
};

void clear_row(const PagedAttention& a, int64_t row) {
  const int64_t size = size_of(a.q_type);
  for (int64_t h = 0; h < a.q_heads; ++h)
    std::memset(static_cast<char*>(a.out) + (row * a.out_row + h * a.out_head) * size, 0,
                static_cast<size_t>(a.v_dim * size));
}

struct Tiles {
  int64_t count, products;
};

// Cuts the rows into tiles: adjacent rows of one sequence and plane, whose ranges of keys leave no
// gap, for the pages in a gap may be anything. Padding rows are in no tile.
Tiles cut(const PagedAttention& a, Tile* tiles) {
  const int64_t most = most_rows(a);
  int64_t count = 0, keys = 0, low = 0, high = 0;
  const auto joins = [&](int64_t row, int64_t first, int64_t last) {
    if (count == 0) return false;
    const Tile& t = tiles[count - 1];
    return t.row + t.rows == row && t.rows < most && a.sequence[row] == a.sequence[t.row] &&
           (a.plane == nullptr || a.plane[row] == a.plane[t.row]) && first <= high + 1 &&
           last + 1 >= low;
  };
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t last = a.position[row];
    if (last < 0) {
      clear_row(a, row);
      continue;
    }
    const int64_t first = first_key(a, last);
    keys += last - first + 1;
    if (joins(row, first, last)) {
      ++tiles[count - 1].rows;
      low = std::min(low, first);
      high = std::max(high, last);
    } else {
      tiles[count++] = {static_cast<int32_t>(row), 1};
      low = first;
      high = last;
    }
  }
  return {count, keys * a.q_heads * (a.k_dim + a.v_dim)};
}

// Every tile's kv heads, together as far as its queries are few and no thread goes without: what
// lies side by side in a page is then read at one time. Last rows first: in a prompt they take
// longest. Returns the number of tasks.
int64_t share(const PagedAttention& a, const Tile* tiles, int64_t count, AttentionTask* tasks) {
  const int64_t fair = a.slots > 1 ? count * a.kv_heads / (a.slots * kTasksPerSlot) : a.kv_heads;
  int64_t made = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    const int64_t heads = std::max<int64_t>(1, std::min(fair, most_heads(a, tiles[i].rows)));
    for (int64_t head = 0; head < a.kv_heads; head += heads)
      tasks[made++] = {tiles[i].row, tiles[i].rows, static_cast<int32_t>(head),
                       static_cast<int32_t>(std::min(heads, a.kv_heads - head))};
  }
  return made;
}

// Where the parts of the scratch begin, in bytes: tiles, tasks, and each slot's own.
struct Parts {
  int64_t tasks, slots, slot, total;

  explicit Parts(const PagedAttention& a) {
    tasks = round_up(a.rows * static_cast<int64_t>(sizeof(Tile)), 64);
    slots = tasks + round_up(a.rows * a.kv_heads * static_cast<int64_t>(sizeof(AttentionTask)), 64);
    slot = AttentionScratch(a).total_floats * static_cast<int64_t>(sizeof(float));
    total = slots + a.slots * slot;
  }
};

}  // namespace

const Kernel<PagedAttentionFn>& paged_attention_kernel() { return pick(kKernels); }

size_t paged_attention_scratch(const PagedAttention& a) {
  return a.q_heads == 0 ? 0 : static_cast<size_t>(Parts(a).total);
}

void paged_attention(const PagedAttention& a) {
  if (a.rows == 0 || a.q_heads == 0) return;
  const auto run = paged_attention_kernel().run;
  const Parts parts(a);
  char* const scratch = static_cast<char*>(a.scratch);
  auto* const tiles = reinterpret_cast<Tile*>(scratch);
  auto* const tasks = reinterpret_cast<AttentionTask*>(scratch + parts.tasks);
  const Tiles cut_tiles = cut(a, tiles);
  const int64_t count = share(a, tiles, cut_tiles.count, tasks);
  const int64_t workers = std::min({a.slots, count, 1 + cut_tiles.products / kGrainProducts});
  // The chunk is a slot, and slots claim tasks: the scratch in use never exceeds what was given,
  // whatever the number of threads has become since.
  std::atomic<int64_t> next{0};
  parallel_for(workers, [&](int64_t slot, int64_t) {
    auto* const own = reinterpret_cast<float*>(scratch + parts.slots + slot * parts.slot);
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1))
      run(a, tasks[task], own);
  });
}

}  // namespace effinfer
