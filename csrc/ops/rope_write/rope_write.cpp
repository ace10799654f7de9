#include "ops/rope_write/rope_write.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<RopeWriteFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, rope_write_avx512},
    {"avx2", kAvx2, rope_write_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, rope_write_neon},
#endif
    {"scalar", kScalar, rope_write_scalar},
};

constexpr int64_t kGrainElements = 32768;  // about 10 us: less is not worth waking a thread

}  // namespace

const Kernel<RopeWriteFn>& rope_write_kernel() { return pick(kKernels); }

void rope_write(const RopeWrite& a) {
  const auto run = rope_write_kernel().run;
  const int64_t width = (a.q_heads + a.kv_heads) * a.k.dim + a.kv_heads * a.v.dim;
  parallel_ranges(a.rows, 1 + kGrainElements / width,
                  [&](int64_t begin, int64_t end, int64_t) { run(a, begin, end); });
}

}  // namespace effinfer
