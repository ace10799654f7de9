#include "ops/causal_conv1d/causal_conv1d.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<CausalConv1dFn> kKernels[] = {
    {"scalar", kScalar, causal_conv1d_scalar},
};

// A part is large enough to hide its start (weights, the window's first columns) and small enough
// to share: about 50 us.
constexpr int64_t kChannels = 512, kTimes = 256;
constexpr int64_t kGrainElements = 16384;  // about 5 us: less is not worth waking a thread

int64_t blocks(int64_t n, int64_t size) { return n > 0 ? (n + size - 1) / size : 0; }

}  // namespace

const Kernel<CausalConv1dFn>& causal_conv1d_kernel() { return pick(kKernels); }

void causal_conv1d(const CausalConv1d& a) {
  const auto run = causal_conv1d_kernel().run;
  const int64_t dims = blocks(a.dim, kChannels);
  // Every sequence gets as many time parts as the longest could need; an empty one costs nothing,
  // but the first exists even for an empty sequence, to write its states.
  const int64_t times = a.length > kTimes ? blocks(a.length, kTimes) : 1;
  const int64_t elements =
      (a.dim < kChannels ? a.dim : kChannels) * (a.length < kTimes ? a.length : kTimes);
  const int64_t grain = 1 + kGrainElements / (elements + 1);
  parallel_ranges(a.sequences * times * dims, grain, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i % dims, time = i / dims % times, sequence = i / dims / times;
      const int64_t length =
          a.cu_seqlens != nullptr ? a.cu_seqlens[sequence + 1] - a.cu_seqlens[sequence] : a.length;
      CausalConv1dPart part = {.sequence = sequence,
                               .dim_begin = block * kChannels,
                               .dim_end = (block + 1) * kChannels,
                               .begin = time * kTimes,
                               .end = (time + 1) * kTimes};
      if (part.dim_end > a.dim) part.dim_end = a.dim;
      if (part.end > length) part.end = length;
      if (part.begin < part.end || time == 0) run(a, part);
    }
  });
}

}  // namespace effinfer
