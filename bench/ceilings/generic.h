// The measuring loops over vec.h.
#include "base/vec.h"
#include "ceilings/ceilings.h"

namespace effinfer {
namespace {

// Sums `streams` equal parts of the data side by side, prefetching ahead in each.
template <int kStreams>
float read_streams(const float* data, int64_t floats) {
  const int64_t part = floats / kStreams / (4 * kLanes) * (4 * kLanes);
  Vec total[kStreams] = {};
  for (int64_t i = 0; i < part; i += 4 * kLanes) {
    EFFINFER_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      const float* p = data + s * part + i;
      __builtin_prefetch(p + 128);
      total[s] += (load(p) + load(p + kLanes)) + (load(p + 2 * kLanes) + load(p + 3 * kLanes));
    }
  }
  Vec all{};
  for (int s = 0; s < kStreams; ++s) all += total[s];
  return sum(all);
}

float read_loop(const float* data, int64_t floats, int streams) {
  switch (streams) {
    case 1:
      return read_streams<1>(data, floats);
    case 2:
      return read_streams<2>(data, floats);
    case 4:
      return read_streams<4>(data, floats);
    default:
      return read_streams<8>(data, floats);
  }
}

constexpr int kChains = 12;  // latency 4-5 x 2 a cycle, and room in sixteen registers

float fma_loop(int64_t rounds) {
  Vec acc[kChains];
  EFFINFER_UNROLL
  for (int c = 0; c < kChains; ++c) acc[c] = splat(static_cast<float>(c));
  Vec a = splat(0.999f), b = splat(1e-3f);
  for (int64_t r = 0; r < rounds; ++r) {
    EFFINFER_UNROLL
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
    asm volatile("" ::: "memory");
  }
  Vec all{};
  EFFINFER_UNROLL
  for (int c = 0; c < kChains; ++c) all += acc[c];
  return sum(all);
}

}  // namespace
}  // namespace effinfer
