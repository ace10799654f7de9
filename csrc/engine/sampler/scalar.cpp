// The definition, one element at a time.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/sampler/sampler.h"

namespace effinfer::engine {
namespace {

float group_maxima(const float* x, int64_t n, float* maxima) {
  std::fill_n(maxima, kGroups, -std::numeric_limits<float>::infinity());
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(x[i])) return x[i];
    largest = std::max(largest, x[i]);
    maxima[i % kGroups] = std::max(maxima[i % kGroups], x[i]);
  }
  return largest;
}

int64_t at_least(const float* x, int64_t n, float least, int32_t* which, int64_t limit) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < limit; ++i)
    if (x[i] >= least) which[found++] = static_cast<int32_t>(i);
  return found;
}

void weigh(const float* x, int64_t n, float largest, float scale, double* sums) {
  std::fill_n(sums, (n + kBlock - 1) / kBlock, 0.0);
  for (int64_t i = 0; i < n; ++i)
    sums[i / kBlock] += std::exp((double{x[i]} - largest) * double{scale});
}

constexpr RowKernels kRowKernels = {group_maxima, at_least, weigh};

}  // namespace

const RowKernels& row_kernels_scalar() { return kRowKernels; }

}  // namespace effinfer::engine
