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

// The numbers 0, 1, 2.. in the lanes.
template <int... j>
EFFINFER_INLINE IVec lane_numbers(Lanes<j...>) {
  return IVec{j...};
}

// The first pass over a query's scores: those outside the range become -inf; each lane's largest is
// returned. Whole vectors are taken, with whatever lies in their other lanes.
EFFINFER_INLINE Vec mask_scores(float* scores, KeyRange range, float cap) {
  const Vec none = splat(-__builtin_inff());
  const IVec number = lane_numbers(AllLanes{});
  Vec best = none;
  for (int64_t at = range.begin / kLanes * kLanes; at < range.end; at += kLanes) {
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
  return best;
}

// The second pass: scores become weights. Returns each lane's sum of them.
EFFINFER_INLINE Vec exponentiate(float* scores, KeyRange range, Vec top) {
  Vec sum{};
  for (int64_t at = range.begin / kLanes * kLanes; at < range.end; at += kLanes) {
    // No score is above `top`, so only the lower end needs a bound; max keeps a NaN.
    const Vec weight = exp2_bounded(max(splat(-127.f), load(scores + at) - top));
    store(scores + at, weight);
    sum += weight;
  }
  return sum;
}

// The scores of up to kLanes queries, whose range is not empty, become weights; `factor` becomes
// 2^(top before - top after), by which their sums so far shrink.
EFFINFER_INLINE void weigh_scores(float* scores, const KeyRange* range, int64_t queries, float cap,
                                  float* top, float* sums, float* factor) {
  const auto reads = [&](int64_t i) { return range[i].begin < range[i].end; };
  Vec best[kLanes];
  EFFINFER_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    best[i] = splat(-__builtin_inff());
    if (i < queries && reads(i)) best[i] = mask_scores(scores + i * kAttentionBlock, range[i], cap);
  }
  transpose(best);  // now the lanes are queries
  const Vec before = load_n(top, queries);
  Vec after = before;
  EFFINFER_UNROLL
  for (int i = 0; i < kLanes; ++i) after = max(after, best[i]);
  store_n(top, after, queries);
  store(factor, exp2(before - after));
  for (int64_t i = 0; i < queries; ++i) {
    if (!reads(i)) continue;
    const Vec sum = exponentiate(scores + i * kAttentionBlock, range[i], splat(top[i]));
    store(sums + i * kPanel, fma(load(sums + i * kPanel), splat(factor[i]), sum));
  }
}

}  // namespace
}  // namespace effinfer
