#include "ops/causal_conv1d/causal_conv1d.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<CausalConv1dFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, causal_conv1d_avx512},
    {"avx2", kAvx2, causal_conv1d_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, causal_conv1d_neon},
#endif
    {"scalar", kScalar, causal_conv1d_scalar},
};

// A part is large enough to hide its start (weights, the window's first columns), small enough to
// share (about 50 us), and long in the direction in which memory runs.
// Rows of float32 are read and written in place, and memory likes them long.
constexpr int64_t kInPlaceChannels = 2048, kInPlaceTimes = 64;
constexpr int64_t kTimeMajorChannels = 512, kTimeMajorTimes = 128;
constexpr int64_t kChannelMajorChannels = 32, kChannelMajorTimes = 2048;
constexpr int64_t kGrainElements = 16384;  // about 5 us: less is not worth waking a thread

int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }
int64_t blocks(int64_t n, int64_t size) { return n > 0 ? (n + size - 1) / size : 0; }

}  // namespace

const Kernel<CausalConv1dFn>& causal_conv1d_kernel() { return pick(kKernels); }

void causal_conv1d(const CausalConv1d& a) {
  const auto run = causal_conv1d_kernel().run;
  const bool channel_major = distance(a.x_time) < distance(a.x_dim);
  const bool in_place = a.type == DType::f32 && a.x_dim == 1 && a.y_dim == 1;
  const int64_t channels = channel_major ? kChannelMajorChannels
                           : in_place    ? kInPlaceChannels
                                         : kTimeMajorChannels;
  const int64_t part_times = channel_major ? kChannelMajorTimes
                             : in_place    ? kInPlaceTimes
                                           : kTimeMajorTimes;
  const int64_t dims = blocks(a.dim, channels);
  // Every sequence gets as many time parts as the longest could need; an empty one costs nothing,
  // but the first exists even for an empty sequence, to write its states.
  const int64_t times = a.length > part_times ? blocks(a.length, part_times) : 1;
  const int64_t elements =
      (a.dim < channels ? a.dim : channels) * (a.length < part_times ? a.length : part_times);
  const int64_t grain = 1 + kGrainElements / (elements + 1);
  parallel_ranges(a.sequences * times * dims, grain, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i % dims, time = i / dims % times, sequence = i / dims / times;
      const int64_t length =
          a.cu_seqlens != nullptr ? a.cu_seqlens[sequence + 1] - a.cu_seqlens[sequence] : a.length;
      CausalConv1dPart part = {.sequence = sequence,
                               .dim_begin = block * channels,
                               .dim_end = (block + 1) * channels,
                               .begin = time * part_times,
                               .end = (time + 1) * part_times};
      if (part.dim_end > a.dim) part.dim_end = a.dim;
      if (part.end > length) part.end = length;
      if (part.begin < part.end || time == 0) run(a, part);
    }
  });
}

}  // namespace effinfer
