#include "ops/linear/linear.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "base/parallel.h"

namespace effinfer {
namespace {

using namespace linear_layout;

constexpr Kernel<LinearFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, linear_avx512},
    {"avx2", kAvx2, linear_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, linear_neon},
#endif
    {"scalar", kScalar, linear_scalar},
};

constexpr int64_t kLeastPanels = kMaxGroup;  // of a task; one stream alone is half the bandwidth
constexpr int64_t kXFloats = 27000;         // of x copied at a time: they share L2 with the weights
constexpr int64_t kTasksPerSlot = 4;        // enough for a slow worker to be made up for
constexpr int64_t kWorthThreads = 1 << 18;  // multiply-adds: under about 10 us a thread costs more
constexpr int64_t kRowStep = 12;            // a multiple of every kernel's tile

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the output is cut into tasks: `rows` x `panels` each, the rows of one panel group together,
// so that those weights are read from memory once.
struct Cut {
  int64_t rows, panels;            // of one task, at most
  int64_t row_parts, panel_parts;  // tasks
  int64_t x_blocks;
};

Cut cut(const Linear& a) {
  Cut c;
  c.row_parts = ceil_div(a.rows, kMaxRows);
  c.rows =
      a.rows <= kMaxRows ? a.rows : ceil_div(ceil_div(a.rows, c.row_parts), kRowStep) * kRowStep;
  c.row_parts = ceil_div(a.rows, c.rows);
  c.panels = kMaxPanels;
  const int64_t all = panels(a), wanted = a.slots > 1 ? a.slots * kTasksPerSlot : 1;
  while (c.panels > kLeastPanels && c.row_parts * ceil_div(all, c.panels) < wanted) c.panels /= 2;
  c.panel_parts = ceil_div(all, c.panels);
  const int64_t fitting = std::max<int64_t>(1, kXFloats / (c.rows * kXStride));
  c.x_blocks = std::min(fitting, ceil_div(a.k, kTerms));
  return c;
}

// Floats: blocks of x, a panel pair of 16-bit weights widened, and the sums: of one group of
// panels, or of all while they wait for more of x.
int64_t scratch_per_slot(const Linear& a, const Cut& c) {
  const int64_t held = c.x_blocks * kTerms >= a.k ? kMaxGroup : c.panels;
  return c.rows * (c.x_blocks * kXStride + held * kPanel) + 2 * kTerms * kPanel;
}

bool empty(const Linear& a) { return a.rows <= 0 || a.n <= 0; }

}  // namespace

const Kernel<LinearFn>& linear_kernel() { return pick(kKernels); }

size_t linear_scratch(const Linear& a) {
  if (empty(a)) return 0;
  return static_cast<size_t>(a.slots * scratch_per_slot(a, cut(a))) * sizeof(float);
}

void linear(const Linear& a) {
  if (empty(a)) return;
  const auto run = linear_kernel().run;
  const Cut c = cut(a);
  const int64_t per_slot = scratch_per_slot(a, c), tasks = c.row_parts * c.panel_parts;
  const int64_t all = panels(a);
  std::atomic<int64_t> next{0};
  // The chunk is a slot, and slots claim tasks: what a thread may write is its chunk's, whatever
  // the number of threads has become since the scratch was sized.
  auto work = [&](int64_t slot, int64_t) {
    float* scratch = a.scratch + slot * per_slot;
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t row = t % c.row_parts * c.rows, panel = t / c.row_parts * c.panels;
      run(a, {row, std::min(c.rows, a.rows - row), panel, std::min(c.panels, all - panel),
              c.x_blocks, scratch});
    }
  };
  const bool small = a.rows * all * kPanel * a.k < kWorthThreads;
  if (small || a.slots <= 1)
    work(0, 0);
  else
    parallel_for(std::min(a.slots, tasks), work);
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace effinfer
