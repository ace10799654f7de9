#include "ops/ssd_state_update/ssd_state_update.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SsdStateUpdateFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, ssd_state_update_avx512},
    {"avx2", kAvx2, ssd_state_update_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, ssd_state_update_neon},
#endif
    {"scalar", kScalar, ssd_state_update_scalar},
};

constexpr int64_t kGrainElements = 32768;  // about 5 us: less is not worth waking a thread

// The vector kernels walk N: the state must be dense along it, and A dense or constant.
bool dense_along_n(const SsdStateUpdate& a) {
  return a.state_strides[3] == 1 && a.A_strides[2] <= 1 && a.A_strides[2] >= 0;
}

}  // namespace

const Kernel<SsdStateUpdateFn>& ssd_state_update_kernel() { return pick(kKernels); }

void ssd_state_update(const SsdStateUpdate& args) {
  const auto run = dense_along_n(args) || args.state_dim == 1 ? ssd_state_update_kernel().run
                                                              : ssd_state_update_scalar;
  const int64_t heads = args.heads;
  const int64_t grain = 1 + kGrainElements / (1 + args.head_dim * args.state_dim);
  parallel_ranges(args.batch * heads, grain, [&](int64_t begin, int64_t end, int64_t) {
    while (begin < end) {
      const int64_t row = begin / heads, head = begin % heads;
      const int64_t stop = head + (end - begin) < heads ? head + (end - begin) : heads;
      run(args, row, head, stop);
      begin += stop - head;
    }
  });
}

}  // namespace effinfer
