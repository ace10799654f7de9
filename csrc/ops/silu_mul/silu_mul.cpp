#include "ops/silu_mul/silu_mul.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<SiluMulFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, silu_mul_avx512},
    {"avx2", kAvx2, silu_mul_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, silu_mul_neon},
#endif
    {"scalar", kScalar, silu_mul_scalar},
};

constexpr int64_t kGrainElements = 8192;  // about 5 us: less is not worth waking a thread

}  // namespace

const Kernel<SiluMulFn>& silu_mul_kernel() { return pick(kKernels); }

void silu_mul(const SiluMul& args) {
  const auto run = silu_mul_kernel().run;
  const int64_t grain = args.dim > 0 ? 1 + kGrainElements / args.dim : args.rows;
  parallel_ranges(args.rows, grain,
                  [&](int64_t begin, int64_t end, int64_t) { run(args, begin, end); });
}

}  // namespace effinfer
