// From a block's scores to its weights, row by row: 2^(score - the largest so far), scores being in
// units of log(2).
#pragma once
#include "base/vec.h"
#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

constexpr float kLog2E = 1.44269504f;

// tanh(x), error <= 3e-7 |tanh(x)|.
EFFINFER_INLINE Vec tanh(Vec x) {
  const Vec t = abs(x), x2 = x * x;
  Vec near = splat(-0.005717012099921703f);
  near = fma(near, x2, splat(0.020650556311011314f));
  near = fma(near, x2, splat(-0.05374348908662796f));
  near = fma(near, x2, splat(0.13331490755081177f));
  near = fma(near, x2, splat(-0.3333328366279602f));
  near = fma(near * x2, x, x);
  const Vec far = splat(1.f) - splat(2.f) / (exp(t + t) + splat(1.f));
  const Vec signed_far = select_negative(x, -far, far);
  return select(t < splat(0.625f), near, signed_far);
}

EFFINFER_INLINE float largest(Vec x) {
  float part[kLanes];
  __builtin_memcpy(part, &x, sizeof(part));
  EFFINFER_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) EFFINFER_UNROLL
  for (int i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
  return part[0];
}

// The numbers 0, 1, 2.. in the lanes.
template <int... j>
EFFINFER_INLINE IVec lane_numbers(Lanes<j...>) {
  return IVec{j...};
}

// The first pass over one row's scores: those outside the range become -inf, and the row's largest
// is returned, `top` or higher. Whole vectors are taken, with whatever lies in their other lanes.
EFFINFER_INLINE float mask_scores(float* scores, KeyRange range, float cap, float top) {
  const Vec none = splat(-__builtin_inff());
  const IVec number = lane_numbers(AllLanes{});
  const int64_t first = range.begin / kLanes * kLanes;
  Vec best = splat(top);
  for (int64_t at = first; at < range.end; at += kLanes) {
    Vec x = load(scores + at);
    if (cap > 0.f) x = tanh(x) * splat(cap);
    const bool whole = at >= range.begin && at + kLanes <= range.end;
    if (!whole) {
      const IVec key = number + splat_i(static_cast<int32_t>(at));
      const IVec inside = (key >= splat_i(static_cast<int32_t>(range.begin))) &
                          (key < splat_i(static_cast<int32_t>(range.end)));
      x = select(inside, x, none);
    }
    if (!whole || cap > 0.f) store(scores + at, x);
    best = max(best, x);
  }
  return largest(best);
}

// The second pass: scores become weights. Returns the lanes' sums of them.
EFFINFER_INLINE Vec exponentiate(float* scores, KeyRange range, float top) {
  const Vec t = splat(top);
  Vec sum{};
  for (int64_t at = range.begin / kLanes * kLanes; at < range.end; at += kLanes) {
    const Vec weight = exp2(load(scores + at) - t);
    store(scores + at, weight);
    sum += weight;
  }
  return sum;
}

}  // namespace
}  // namespace effinfer
