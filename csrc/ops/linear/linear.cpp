#include "ops/linear/linear.h"

#include <sys/mman.h>

#include <algorithm>

#include "ops/linear/tasks.h"

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
constexpr int64_t kXFloats = 27000;   // of x copied at a time: they share L2 with the weights
constexpr int64_t kTasksPerSlot = 4;  // enough for a slow worker to be made up for
constexpr int64_t kRowStep = 12;      // a multiple of every kernel's tile

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool empty(const Linear& a) { return a.rows <= 0 || a.n <= 0; }

}  // namespace

const Kernel<LinearFn>& linear_kernel() { return pick(kKernels); }

void share_panels(const Linear& a, LinearCut& c) {
  c.panels = kMaxPanels;
  const int64_t all = panels(a), wanted = a.slots > 1 ? a.slots * kTasksPerSlot : 1;
  while (c.panels > kLeastPanels && c.row_parts * ceil_div(all, c.panels) < wanted) c.panels /= 2;
  c.panel_parts = ceil_div(all, c.panels);
}

LinearCut linear_cut(const Linear& a) {
  LinearCut c;
  c.row_parts = ceil_div(a.rows, kMaxRows);
  c.rows =
      a.rows <= kMaxRows ? a.rows : ceil_div(ceil_div(a.rows, c.row_parts), kRowStep) * kRowStep;
  c.row_parts = ceil_div(a.rows, c.rows);
  share_panels(a, c);
  const int64_t fitting = std::max<int64_t>(1, kXFloats / (c.rows * kXStride));
  c.x_blocks = std::min(fitting, ceil_div(a.k, kTerms));
  return c;
}

// Blocks of x, a panel pair of 16-bit weights widened, and the sums: of one group of panels, or of
// all while they wait for more of x.
int64_t linear_scratch_per_slot(const Linear& a, const LinearCut& c) {
  const int64_t held = c.x_blocks * kTerms >= a.k ? kMaxGroup : c.panels;
  return c.rows * (c.x_blocks * kXStride + held * kPanel) + kWide;
}

size_t linear_scratch(const Linear& a) {
  if (empty(a)) return 0;
  return static_cast<size_t>(a.slots * linear_scratch_per_slot(a, linear_cut(a))) * sizeof(float);
}

void linear(const Linear& a) {
  if (empty(a)) return;
  const auto run = linear_kernel().run;
  const LinearCut c = linear_cut(a);
  linear_tasks(a, c, linear_scratch_per_slot(a, c), [&](const LinearTask& t) { run(a, t); });
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
