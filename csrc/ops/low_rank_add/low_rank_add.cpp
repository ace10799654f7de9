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

constexpr int64_t kGrainProducts = 1 << 14;  // less is not worth waking a thread
constexpr int64_t kTile = 4;                 // rows that share the reading of their group

// The first row of the tile that `row` lies in.
int64_t tile_of(const LowRankAdd& a, int64_t row) {
  if (row == a.rows) return row;
  int64_t first = row;
  while (first > 0 && a.index[first - 1] == a.index[row]) --first;
  return row - (row - first) % kTile;
}

}  // namespace

const Kernel<LowRankAddFn>& low_rank_add_kernel() { return pick(kKernels); }

// Over tiles of rows: both halves in one region, and each thread reads other groups' matrices.
void low_rank_add(const LowRankAdd& args) {
  const auto run = low_rank_add_kernel().run;
  const int64_t products = args.rank * args.k + args.up_size;
  parallel_ranges(args.rows, 1 + kGrainProducts / (1 + products),
                  [&](int64_t begin, int64_t end, int64_t) {
                    run(args, tile_of(args, begin), tile_of(args, end));
                  });
}

}  // namespace effinfer
