// The register tiles: R query rows times P panels of 16 keys (scores), or of 16 dimensions of the
// values (weighted sums). Each sum takes its products one after another in ascending order, so the
// tile it falls in changes no bit.
#pragma once
#include "base/vec.h"
#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

constexpr int kPanelVecs = static_cast<int>(kPanel) / kLanes;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kMostSums = 12;  // registers for sums
#else
constexpr int kMostSums = 24;
#endif

// Panels side by side in a tile of R rows: few rows need many to hide the latency of a sum.
template <int R>
constexpr int kPanels = kMostSums / (R * kPanelVecs) >= 4   ? 4
                        : kMostSums / (R * kPanelVecs) >= 2 ? 2
                                                            : 1;

template <int R, int P>
EFFINFER_INLINE void clear(Vec (&sum)[R][P * kPanelVecs]) {
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) EFFINFER_UNROLL
  for (int v = 0; v < P * kPanelVecs; ++v) sum[r][v] = Vec{};
}

// sum[r] += a[r] * the P panels of b.
template <int R, int P, class T>
EFFINFER_INLINE void accumulate(Vec (&sum)[R][P * kPanelVecs], const float* a, int64_t a_stride,
                                const T* b, int64_t panel_stride) {
  Vec panel[P * kPanelVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < P * kPanelVecs; ++v)
    panel[v] = load(b + v / kPanelVecs * panel_stride + v % kPanelVecs * kLanes);
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec x = splat(a[r * a_stride]);
    EFFINFER_UNROLL
    for (int v = 0; v < P * kPanelVecs; ++v) sum[r][v] = fma(x, panel[v], sum[r][v]);
  }
}

// scores[r][key] = q[r] . key, for the keys of P panels [d][kPanel].
template <int R, int P>
__attribute__((noinline)) void score_tile(const float* q, int64_t q_stride, const float* keys,
                                          int64_t dim, float* scores) {
  Vec sum[R][P * kPanelVecs];
  clear<R, P>(sum);
  const int64_t panel_stride = dim * kPanel;
  for (int64_t d = 0; d < dim; ++d)
    accumulate<R, P>(sum, q + d, q_stride, keys + d * kPanel, panel_stride);
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) EFFINFER_UNROLL
  for (int v = 0; v < P * kPanelVecs; ++v)
    store(scores + r * kAttentionBlock + v * kLanes, sum[r][v]);
}

template <int R, int P = kPanels<R>>
void scores_of(const float* q, int64_t q_stride, const float* keys, int64_t dim, int64_t panel,
               int64_t panels, float* scores) {
  for (; panel + P <= panels; panel += P)
    score_tile<R, P>(q, q_stride, keys + panel * dim * kPanel, dim, scores + panel * kPanel);
  if constexpr (P > 1) scores_of<R, P / 2>(q, q_stride, keys, dim, panel, panels, scores);
}

// A block's values: key j's dimensions from panel p on lie at rows[j] + p * panel_stride.
template <class T>
struct Values {
  const T* const* rows;
  int64_t panel_stride;
};

// out[r] = out[r] * factor[r] + sum of weights[r][j] * value j, for keys [begin, end) and P panels
// of dimensions.
template <int R, int P, class T>
__attribute__((noinline)) void value_tile(const float* weights, const float* factor,
                                          const Values<T>& values, int64_t panel, int64_t begin,
                                          int64_t end, float* out, int64_t out_stride) {
  const T* const* const rows = values.rows;
  const int64_t panel_stride = values.panel_stride, from = panel * panel_stride;
  Vec sum[R][P * kPanelVecs];
  clear<R, P>(sum);
  for (int64_t j = begin; j < end; ++j)
    accumulate<R, P>(sum, weights + j, kAttentionBlock, rows[j] + from, panel_stride);
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec f = splat(factor[r]);
    float* const to = out + r * out_stride + panel * kPanel;
    EFFINFER_UNROLL
    for (int v = 0; v < P * kPanelVecs; ++v)
      store(to + v * kLanes, fma(load(to + v * kLanes), f, sum[r][v]));
  }
}

template <int R, class T, int P = kPanels<R>>
void weigh_values(const float* weights, const float* factor, const Values<T>& values, int64_t panel,
                  int64_t panels, int64_t begin, int64_t end, float* out, int64_t out_stride) {
  for (; panel + P <= panels; panel += P)
    value_tile<R, P>(weights, factor, values, panel, begin, end, out, out_stride);
  if constexpr (P > 1)
    weigh_values<R, T, P / 2>(weights, factor, values, panel, panels, begin, end, out, out_stride);
}

}  // namespace
}  // namespace effinfer
