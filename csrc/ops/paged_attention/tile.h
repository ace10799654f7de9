// The register tiles: R query rows of H kv heads times P panels of 16 keys (scores), or of 16
// dimensions of the values (weighted sums). Each sum takes its products one after another in
// ascending order, so the tile it falls in changes no bit.
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

// A block's keys, in elements: dimension d of panel p of head h lies at
// panel[p] + from + h * head + d * dim.
template <class T>
struct Keys {
  const T* const* panel;
  int64_t from, head, dim;

  Keys of_head(int64_t h) const { return {panel, from + h * head, head, dim}; }
};

// A block's values, in elements: panel p of the dimensions of value j of head h lies at
// rows[j] + from + h * head + p * panel.
template <class T>
struct Values {
  const T* const* rows;
  int64_t from, head, panel;

  Values of_head(int64_t h) const { return {rows, from + h * head, head, panel}; }
};

template <int R, int V>
EFFINFER_INLINE void clear(Vec (&sum)[R][V]) {
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) EFFINFER_UNROLL
  for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
}

// sum[h, r] += a[h, r] * the P panels of head h; panel(h, p) is where one lies.
template <int H, int R, int P, class Panel>
EFFINFER_INLINE void accumulate(Vec (&sum)[H * R][P * kPanelVecs], const float* a, int64_t a_stride,
                                Panel&& panel) {
  EFFINFER_UNROLL
  for (int h = 0; h < H; ++h) {
    Vec b[P * kPanelVecs];
    EFFINFER_UNROLL
    for (int v = 0; v < P * kPanelVecs; ++v)
      b[v] = load(panel(h, v / kPanelVecs) + v % kPanelVecs * kLanes);
    EFFINFER_UNROLL
    for (int r = h * R; r < (h + 1) * R; ++r) {
      const Vec x = splat(a[r * a_stride]);
      EFFINFER_UNROLL
      for (int v = 0; v < P * kPanelVecs; ++v) sum[r][v] = fma(x, b[v], sum[r][v]);
    }
  }
}

// scores[h, r][key] = q[h, r] . key, for the keys of P panels from `panel` on.
template <int H, int R, int P, class T>
__attribute__((noinline)) void score_tile(const float* q, int64_t q_stride, const Keys<T>& keys,
                                          int64_t panel, int64_t dim, float* scores) {
  Vec sum[H * R][P * kPanelVecs];
  clear(sum);
  const T* panels[P];
  EFFINFER_UNROLL
  for (int p = 0; p < P; ++p) panels[p] = keys.panel[panel + p] + keys.from;
  const int64_t head = keys.head, step = keys.dim;
  for (int64_t d = 0, at = 0; d < dim; ++d, at += step)
    accumulate<H, R, P>(sum, q + d, q_stride,
                        [&](int h, int p) { return panels[p] + at + h * head; });
  EFFINFER_UNROLL
  for (int r = 0; r < H * R; ++r) EFFINFER_UNROLL
  for (int v = 0; v < P * kPanelVecs; ++v)
    store(scores + r * kAttentionBlock + panel * kPanel + v * kLanes, sum[r][v]);
}

// scores[query][key] for the keys of panels [panel, panels): R queries of a head at a time, a panel
// for all of them before the next one.
template <int R, class T>
void scores_of(const float* q, int64_t q_stride, int64_t queries, const Keys<T>& keys, int64_t dim,
               int64_t panel, int64_t panels, float* scores) {
  constexpr int P = kPanels<R>;
  const int64_t whole = queries / R * R;
  const auto tiles = [&](auto wide, int64_t p) {
    for (int64_t i = 0; i < whole; i += R)
      score_tile<1, R, decltype(wide)::value>(q + i * q_stride, q_stride, keys, p, dim,
                                              scores + i * kAttentionBlock);
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

// Queries that read the same keys of a block, and what they keep.
struct Segment {
  int64_t queries;
  KeyRange range;
  const float* weights;  // [query][kAttentionBlock]
  const float* factor;   // [query]
  float* out;            // [query], v_stride apart
};

// out[h, r] = out[h, r] * factor[h, r] + sum of weights[h, r][j] * value j, for P panels of
// dimensions.
template <int H, int R, int P, class T>
__attribute__((noinline)) void value_tile(const Segment& s, const Values<T>& values, int64_t panel,
                                          int64_t v_stride) {
  const T* const* const rows = values.rows;
  const int64_t panel_stride = values.panel, head = values.head;
  const int64_t from = values.from + panel * panel_stride, end = s.range.end;
  const float *const weights = s.weights, *const factor = s.factor;
  Vec sum[H * R][P * kPanelVecs];
  clear(sum);
  for (int64_t j = s.range.begin; j < end; ++j) {
    const T* const row = rows[j] + from;
    accumulate<H, R, P>(sum, weights + j, kAttentionBlock,
                        [&](int h, int p) { return row + h * head + p * panel_stride; });
  }
  EFFINFER_UNROLL
  for (int r = 0; r < H * R; ++r) {
    const Vec f = splat(factor[r]);
    float* const to = s.out + r * v_stride + panel * kPanel;
    EFFINFER_UNROLL
    for (int v = 0; v < P * kPanelVecs; ++v)
      store(to + v * kLanes, fma(load(to + v * kLanes), f, sum[r][v]));
  }
}

// The same for panels [panel, panels) and a run-time number of queries of a head, at most R.
template <int R, class T>
void weigh_values(const Segment& s, const Values<T>& values, int64_t panel, int64_t panels,
                  int64_t v_stride) {
  if constexpr (R > 1) {
    if (s.queries < R) return weigh_values<R - 1>(s, values, panel, panels, v_stride);
  }
  constexpr int P = kPanels<R>;
  for (; panel + P <= panels; panel += P) value_tile<1, R, P>(s, values, panel, v_stride);
  for (; panel < panels; ++panel) value_tile<1, R, 1>(s, values, panel, v_stride);
}

// Cuts panels [panel, panels) of heads with one query each into tiles of 4 panels, and calls
// tile(Count<heads>, Count<panels>, head, panel): where a head has fewer, several heads hide the
// latency of the sums.
template <class F>
EFFINFER_INLINE void tile_heads(int64_t heads, int64_t panel, int64_t panels, F&& tile) {
  const int64_t whole = panel + (panels - panel) / 4 * 4;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t p = panel; p < whole; p += 4) tile(Count<1>{}, Count<4>{}, h, p);
  const auto across = [&](auto high, auto wide, int64_t p) {
    constexpr int kHigh = decltype(high)::value;
    int64_t h = 0;
    for (; h + kHigh <= heads; h += kHigh) tile(high, wide, h, p);
    for (; h < heads; ++h) tile(Count<1>{}, wide, h, p);
  };
  const int64_t left = panels - whole;
  if (left >= 2) across(Count<2>{}, Count<2>{}, whole);
  if (left % 2 == 1) across(Count<4>{}, Count<1>{}, panels - 1);
}

}  // namespace
}  // namespace effinfer
