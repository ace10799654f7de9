// What a chunk's tokens weigh in each other's results.
#pragma once
#include "base/vec.h"
#include "ops/ssd/ssd.h"

namespace effinfer {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

// M_ij = G_ij d_j prod_{j < k <= i} decay_k for j <= i < tokens, the products by columns; post_j is
// what multiplies G in the last row. A few vectors of columns go together, as each is one chain of
// latencies. delta has kSsdChunk elements.
__attribute__((noinline)) void weigh_scores(const float* G, const float* delta, const float* decay,
                                            int64_t tokens, float* M, float* post) {
  constexpr int kTogether = 3;
  static_assert(kSsdChunk % (kTogether * kLanes) == 0);
  IVec lane{};
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int64_t j = 0; j < tokens; j += kTogether * kLanes) {
    Vec first[kTogether], weight[kTogether];
    EFFINFER_UNROLL
    for (int v = 0; v < kTogether; ++v) {
      first[v] = load(delta + j + v * kLanes);
      weight[v] = Vec{};
    }
    for (int64_t i = j; i < tokens; ++i) {
      const Vec factor = splat(decay[i]);
      const IVec diagonal = splat_i(static_cast<int>(i - j));
      const int64_t at = i * kSsdChunk + j;
      EFFINFER_UNROLL
      for (int v = 0; v < kTogether; ++v) {
        Vec w = weight[v] * factor;
        // Denormals are slow on some CPUs; what they would add is below any rounding.
        w = select(abs(w) < splat(kSmallestNormal), Vec{}, w);
        w = weight[v] = select(lane + splat_i(v * kLanes) == diagonal, first[v], w);
        store(M + at + v * kLanes, load(G + at + v * kLanes) * w);
      }
    }
    EFFINFER_UNROLL
    for (int v = 0; v < kTogether; ++v) store(post + j + v * kLanes, weight[v]);
  }
}

}  // namespace
}  // namespace effinfer
