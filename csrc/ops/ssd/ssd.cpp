#include "ops/ssd/ssd.h"

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

constexpr int64_t kTasksPerThread = 3;
constexpr int64_t kStateBudget = 96 * 1024;  // floats of packed states per task: within L2

// How many heads one task scans together, sharing C B^T: all that L2 holds, but fewer where that
// would leave threads idle. The heads of a task don't influence each other's bits.
int64_t heads_per_task(const Ssd& a, int64_t threads) {
  const int64_t per_group = a.heads / a.groups;
  const SsdScratch one(a, 1);
  int64_t block = kStateBudget / one.state_floats;
  if (threads > 1) {
    const int64_t share = a.sequences * a.heads / (threads * kTasksPerThread);
    if (share < block) block = share;
  }
  return block < 1 ? 1 : block < per_group ? block : per_group;
}

}  // namespace

const Kernel<SsdFn>& ssd_kernel() { return pick(kKernels); }

int64_t ssd_scratch(const Ssd& a) {
  const int64_t threads = num_threads();
  return threads * SsdScratch(a, heads_per_task(a, threads)).total_floats;
}

void ssd(const Ssd& args) {
  if (args.sequences == 0 || args.heads == 0) return;
  const auto run = ssd_kernel().run;
  const int64_t block = heads_per_task(args, num_threads());
  const int64_t stride = SsdScratch(args, block).total_floats;
  const int64_t per_group = args.heads / args.groups;
  const int64_t blocks = (per_group + block - 1) / block;
  parallel_for(args.sequences * args.groups * blocks, [&](int64_t task, int64_t worker) {
    const int64_t group = task / blocks % args.groups;
    const int64_t begin = group * per_group + task % blocks * block;
    const int64_t group_end = (group + 1) * per_group;
    run(args, task / blocks / args.groups, begin,
        begin + block < group_end ? begin + block : group_end, args.scratch + worker * stride);
  });
}

}  // namespace effinfer
