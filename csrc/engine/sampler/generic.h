// The sampler's passes over a row, over vec.h.
#include "base/vec.h"
#include "engine/sampler/sampler.h"

namespace effinfer::engine {
namespace {

float group_maxima(const float* x, int64_t n, float* maxima) {
  const Vec none = splat(-__builtin_inff());
  for (int64_t g = 0; g < kGroups; g += kLanes) store(maxima + g, none);
  IVec numbers = ~IVec{};
  int64_t i = 0;
  for (; i + kGroups <= n; i += kGroups)
    for (int64_t g = 0; g < kGroups; g += kLanes) {
      const Vec value = load(x + i + g);
      numbers &= (IVec)(value == value);
      store(maxima + g, max(load(maxima + g), value));
    }
  Vec largest = none;
  for (int64_t g = 0; g < kGroups; g += kLanes) largest = max(largest, load(maxima + g));
  float lanes[kLanes];
  store(lanes, largest);
  float first = lanes[0];
  for (const float lane : lanes) first = lane > first ? lane : first;
  bool sound = all(numbers);
  for (int64_t g = 0; i + g < n; ++g) {
    const float value = x[i + g];
    sound &= value == value;
    if (value > maxima[g]) maxima[g] = value;
    if (value > first) first = value;
  }
  return sound ? first : __builtin_nanf("");
}

int64_t at_least(const float* x, int64_t n, float least, int32_t* which, int64_t limit) {
  const Vec bound = splat(least);
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < limit; i += kLanes) {
    const int64_t end = i + kLanes < n ? i + kLanes : n;
    if (end == i + kLanes && all((IVec)(load(x + i) < bound))) continue;  // nearly always
    for (int64_t at = i; at < end && found < limit; ++at)
      if (x[at] >= least) which[found++] = static_cast<int32_t>(at);
  }
  return found;
}

void weigh(const float* x, int64_t n, float largest, float scale, double* sums) {
  const Vec zero_at = splat(largest), factor = splat(scale);
  const auto weight = [&](Vec value) { return exp((value - zero_at) * factor); };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Vec even{}, odd{};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      even += weight(load(x + i));
      odd += weight(load(x + i + kLanes));
    }
    for (; i < end; i += kLanes) {
      const int64_t left = end - i < kLanes ? end - i : kLanes;
      float kept[kLanes];
      store(kept, weight(load_n(x + i, left)));  // lanes past the row weigh something, too
      even += load_n(kept, left);
    }
    sums[begin / kBlock] = sum(even + odd);
  }
}

constexpr RowKernels kRowKernels = {group_maxima, at_least, weigh};

}  // namespace
}  // namespace effinfer::engine
