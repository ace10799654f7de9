#include "ops/causal_conv1d_update/causal_conv1d_update.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<CausalConv1dUpdateFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, causal_conv1d_update_avx512},
    {"avx2", kAvx2, causal_conv1d_update_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, causal_conv1d_update_neon},
#endif
    {"scalar", kScalar, causal_conv1d_update_scalar},
};

constexpr int64_t kChannels = 64;  // whole vectors, whatever the instruction set
constexpr int64_t kGrainElements = 8192;

}  // namespace

const Kernel<CausalConv1dUpdateFn>& causal_conv1d_update_kernel() { return pick(kKernels); }

void causal_conv1d_update(const CausalConv1dUpdate& a) {
  const auto run = causal_conv1d_update_kernel().run;
  const int64_t grain = 1 + kGrainElements / (1 + kChannels * a.batch * a.length);
  parallel_ranges((a.dim + kChannels - 1) / kChannels, grain,
                  [&](int64_t begin, int64_t end, int64_t) {
                    const int64_t last = end * kChannels;
                    run(a, begin * kChannels, last < a.dim ? last : a.dim);
                  });
}

}  // namespace effinfer
