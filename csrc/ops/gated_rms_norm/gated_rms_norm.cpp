#include "ops/gated_rms_norm/gated_rms_norm.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<GatedRmsNormFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, gated_rms_norm_avx512},
    {"avx2", kAvx2, gated_rms_norm_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, gated_rms_norm_neon},
#endif
    {"scalar", kScalar, gated_rms_norm_scalar},
};

constexpr int64_t kGrainElements = 16384;  // about 5 us: less is not worth waking a thread

}  // namespace

const Kernel<GatedRmsNormFn>& gated_rms_norm_kernel() { return pick(kKernels); }

void gated_rms_norm(const GatedRmsNorm& args) {
  const auto run = gated_rms_norm_kernel().run;
  const int64_t grain = args.dim > 0 ? 1 + kGrainElements / args.dim : args.rows;
  parallel_ranges(args.rows, grain,
                  [&](int64_t begin, int64_t end, int64_t) { run(args, begin, end); });
}

}  // namespace effinfer
