#include "ops/softmax_top2/softmax_top2.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SoftmaxTop2Fn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, softmax_top2_avx512},
    {"avx2", kAvx2, softmax_top2_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, softmax_top2_neon},
#endif
    {"scalar", kScalar, softmax_top2_scalar},
};

constexpr int64_t kGrainElements = 8192;  // about 5 us: less is not worth waking a thread

}  // namespace

const Kernel<SoftmaxTop2Fn>& softmax_top2_kernel() { return pick(kKernels); }

void softmax_top2(const SoftmaxTop2& args) {
  const auto run = softmax_top2_kernel().run;
  const int64_t grain = args.dim > 0 ? 1 + kGrainElements / args.dim : args.rows;
  parallel_ranges(args.rows, grain,
                  [&](int64_t begin, int64_t end, int64_t) { run(args, begin, end); });
}

}  // namespace effinfer
