#include "ops/ssd/ssd.h"

#include <algorithm>
#include <atomic>

#include "base/parallel.h"
#include "ops/ssd/scratch.h"

namespace effinfer {
namespace {

constexpr Kernel<SsdFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, ssd_avx512},
    {"avx2", kAvx2, ssd_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, ssd_neon},
#endif
    {"scalar", kScalar, ssd_scalar},
};

constexpr int64_t kTasksPerThread = 2;
// Floats of packed states per task. Each is read and written once a chunk, in order, which L3 keeps
// up with: what more heads save by sharing B, C and C B^T is worth more than staying within L2.
constexpr int64_t kStateBudget = 256 * 1024;

// How many heads one task scans together: all within the budget, but fewer where that would leave
// threads idle. The heads of a task don't influence each other's bits.
int64_t heads_per_task(const Ssd& a) {
  const int64_t per_group = a.heads / a.groups;
  const SsdScratch one(a, 1);
  int64_t block = kStateBudget / (1 + one.state_floats);
  if (a.slots > 1) {
    const int64_t share = a.sequences * a.heads / (a.slots * kTasksPerThread);
    if (share < block) block = share;
  }
  const int64_t blocks = block < 1 ? per_group : (per_group + block - 1) / block;
  return (per_group + blocks - 1) / blocks;  // all about the same
}

}  // namespace

const Kernel<SsdFn>& ssd_kernel() { return pick(kKernels); }

int64_t ssd_scratch(const Ssd& a) {
  return a.slots * SsdScratch(a, heads_per_task(a)).total_floats;
}

void ssd(const Ssd& a) {
  if (a.sequences == 0 || a.heads == 0) return;
  const auto run = ssd_kernel().run;
  const int64_t block = heads_per_task(a);
  const int64_t stride = SsdScratch(a, block).total_floats;
  const int64_t per_group = a.heads / a.groups;
  const int64_t blocks = (per_group + block - 1) / block;
  const int64_t tasks = a.sequences * a.groups * blocks;
  // The chunk is a slot, and slots claim tasks: the scratch in use never exceeds what was given,
  // whatever the number of threads has become since.
  std::atomic<int64_t> next{0};
  parallel_for(std::min(a.slots, tasks), [&](int64_t slot, int64_t) {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
      const int64_t group = task / blocks % a.groups;
      const int64_t begin = group * per_group + task % blocks * block;
      const int64_t end = std::min(begin + block, (group + 1) * per_group);
      run(a, task / blocks / a.groups, begin, end, a.scratch + slot * stride);
    }
  });
}

}  // namespace effinfer
