#include "ops/selective_state_update/selective_state_update.h"

#include <algorithm>

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SelectiveStateUpdateFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, selective_state_update_avx512},
    {"avx2", kAvx2, selective_state_update_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, selective_state_update_neon},
#endif
    {"scalar", kScalar, selective_state_update_scalar},
};

constexpr int64_t kGrainElements = 32768;  // about 10 us: less is not worth waking a thread

}  // namespace

const Kernel<SelectiveStateUpdateFn>& selective_state_update_kernel() { return pick(kKernels); }

void selective_state_update(const SelectiveStateUpdate& args) {
  if (args.dim == 0) return;
  const auto run = selective_state_update_kernel().run;
  const int64_t group = args.dim / args.groups;
  const int64_t per_group = (group + kStepUnit - 1) / kStepUnit;
  const int64_t per_row = args.groups * per_group;
  const int64_t grain = 1 + kGrainElements / (kStepUnit * (args.state_size + 1));
  parallel_ranges(args.batch * per_row, grain, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % per_row, offset = part % per_group * kStepUnit;
      const int64_t channel = part / per_group * group + offset;
      run(args, i / per_row, channel, channel + std::min(kStepUnit, group - offset));
    }
  });
}

}  // namespace effinfer
