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

template <int N>
struct Count {
  static constexpr int value = N;
};

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

// scores[query][key] for the keys of panels [panel, panels): R queries at a time, a panel for all
// of them before the next one.
template <int R>
void scores_of(const float* q, int64_t q_stride, int64_t queries, const float* keys, int64_t dim,
               int64_t panel, int64_t panels, float* scores) {
  constexpr int P = kPanels<R>;
  const int64_t whole = queries / R * R;
  const auto tiles = [&](auto wide, int64_t p) {
    for (int64_t i = 0; i < whole; i += R)
      score_tile<R, decltype(wide)::value>(q + i * q_stride, q_stride, keys + p * dim * kPanel, dim,
                                           scores + i * kAttentionBlock + p * kPanel);
  };
  for (int64_t p = panel; p < panels;) {
    const bool fits = p + P <= panels;
    if (fits)
      tiles(Count<P>{}, p);
    else
      tiles(Count<1>{}, p);
    p += fits ? P : 1;
  }
  if constexpr (R > 1) {
    if (whole < queries)
      scores_of<R - 1>(q + whole * q_stride, q_stride, queries - whole, keys, dim, panel, panels,
                       scores + whole * kAttentionBlock);
  }
}

// A block's values: key j's dimensions from panel p on lie at rows[j] + from + p * panel_stride.
template <class T>
struct Values {
  const T* const* rows;
  int64_t from, panel_stride;
};

// Queries that read the same keys of a block, and what they keep.
struct Segment {
  int64_t queries;
  KeyRange range;
  const float* weights;  // [query][kAttentionBlock]
  const float* factor;   // [query]
  float* out;            // [query], v_stride apart
};

// out[r] = out[r] * factor[r] + sum of weights[r][j] * value j, for P panels of dimensions.
template <int R, int P, class T>
__attribute__((noinline)) void value_tile(const Segment& s, const Values<T>& values, int64_t panel,
                                          int64_t v_stride) {
  const T* const* const rows = values.rows;
  const int64_t panel_stride = values.panel_stride;
  const int64_t from = values.from + panel * panel_stride, end = s.range.end;
  const float *const weights = s.weights, *const factor = s.factor;
  Vec sum[R][P * kPanelVecs];
  clear<R, P>(sum);
  for (int64_t j = s.range.begin; j < end; ++j)
    accumulate<R, P>(sum, weights + j, kAttentionBlock, rows[j] + from, panel_stride);
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec f = splat(factor[r]);
    float* const to = s.out + r * v_stride + panel * kPanel;
    EFFINFER_UNROLL
    for (int v = 0; v < P * kPanelVecs; ++v)
      store(to + v * kLanes, fma(load(to + v * kLanes), f, sum[r][v]));
  }
}

// The same for panels [panel, panels) and a run-time number of queries, at most R.
template <int R, class T>
void weigh_values(const Segment& s, const Values<T>& values, int64_t panel, int64_t panels,
                  int64_t v_stride) {
  if constexpr (R > 1) {
    if (s.queries < R) return weigh_values<R - 1>(s, values, panel, panels, v_stride);
  }
  constexpr int P = kPanels<R>;
  for (; panel + P <= panels; panel += P) value_tile<R, P>(s, values, panel, v_stride);
  for (; panel < panels; ++panel) value_tile<R, 1>(s, values, panel, v_stride);
}

}  // namespace
}  // namespace effinfer
