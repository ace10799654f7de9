#include "ops/low_rank_add/low_rank_add.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<LowRankAddFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, low_rank_add_avx512},
    {"avx2", kAvx2, low_rank_add_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, low_rank_add_neon},
#endif
    {"scalar", kScalar, low_rank_add_scalar},
};

constexpr int64_t kGrainProducts = 1 << 16;  // about 5 us: less is not worth waking a thread

}  // namespace

const Kernel<LowRankAddFn>& low_rank_add_kernel() { return pick(kKernels); }

void low_rank_add(const LowRankAdd& args) {
  const auto run = low_rank_add_kernel().run;
  const auto over = [&](LowRankHalf half, int64_t items, int64_t products) {
    parallel_ranges(items, 1 + kGrainProducts / (1 + args.rows * products),
                    [&](int64_t begin, int64_t end, int64_t) { run(args, half, begin, end); });
  };
  if (args.rows == 0) return;
  over(LowRankHalf::down, args.rank, args.k);
  over(LowRankHalf::up, args.panels(), LowRankAdd::kPanel * args.rank / args.part_count);
}

}  // namespace effinfer
