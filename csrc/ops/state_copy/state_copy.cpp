#include "ops/state_copy/state_copy.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<StateCopyFn> kKernels[] = {
    {"scalar", kScalar, state_copy_scalar},
};

constexpr int64_t kGrainBytes = 131072;  // about 10 us: less is not worth waking a thread

}  // namespace

const Kernel<StateCopyFn>& state_copy_kernel() { return pick(kKernels); }

void state_copy(const StateCopy& a) {
  const auto run = state_copy_kernel().run;
  int64_t bytes = a.run;
  for (int64_t size : a.size) bytes *= size;
  parallel_ranges(a.count, 1 + kGrainBytes / (bytes + 1),
                  [&](int64_t begin, int64_t end, int64_t) { run(a, begin, end); });
}

}  // namespace effinfer
