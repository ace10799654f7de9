// paged_attention over vec.h: one task. Its queries walk over the keys together, block by block and
// kv head by kv head, a strip of queries at a time against a block that lies in L1.
#pragma once
#include "ops/paged_attention/keys.h"
#include "ops/paged_attention/softmax.h"
#include "ops/paged_attention/tile.h"

namespace effinfer {
namespace {

// With so few queries, values and 16-bit keys are read where they lie: a copy would be used too
// seldom.
constexpr int64_t kFewQueries = 2 * kTileHeight;

// Queries that meet a block together: `count` of each of `heads` kv heads. In the scratch they lie
// one after another, from `query` on.
struct Strip {
  int64_t query, heads, count;
  KeyRange range[kStrip];
  KeyRange all;  // what any of them reads

  int64_t queries() const { return heads * count; }
};

// A task's walk over the keys.
struct Walk {
  const PagedAttention& a;
  const AttentionTask& t;
  float* const scratch;
  const AttentionScratch at{a};
  const Pages pages{a, t.row};
  const int64_t group = queries_per_row(a), queries = t.rows * group;  // of one kv head
  const int64_t value_panels = (a.v_dim + kPanel - 1) / kPanel;
  const float cap = a.softcap > 0.f ? a.softcap* kLog2E : 0.f;
  // Whether keys and values are read where they lie, and what type is read then.
  const bool few = queries <= kFewQueries;
  const bool keys_in_place = pages.columns && (few || a.k_type == DType::f32);
  const bool values_in_place = few && a.v_dim % kPanel == 0;
  const DType key_type = keys_in_place ? a.k_type : DType::f32;
  const DType value_type = values_in_place ? a.v_type : DType::f32;

  // Calls f(the query's index in the scratch, row, query head) for all of them.
  template <class F>
  EFFINFER_INLINE void each_query(F&& f) const {
    int64_t query = 0;
    for (int64_t head = t.kv_head; head < t.kv_head + t.kv_heads; ++head)
      for (int64_t row = t.row; row < t.row + t.rows; ++row)
        for (int64_t g = 0; g < group; ++g) f(query++, row, head * group + g);
  }

  template <class T>
  __attribute__((noinline)) void begin() const {
    const Vec unit = splat(a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2E);
    const int64_t dim = a.k_dim, v_stride = at.v_stride;
    each_query([&](int64_t query, int64_t row, int64_t head) {
      const T* const q = static_cast<const T*>(a.q) + row * a.q_row + head * a.q_head;
      float* const to = scratch + at.q + query * at.q_stride;
      for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load_up_to(q + d, dim - d) * unit);
      float* const out = scratch + at.out + query * v_stride;
      for (int64_t d = 0; d < v_stride; d += kLanes) store(out + d, Vec{});
      store(scratch + at.sum + query * kPanel, Vec{});
      scratch[at.top + query] = -__builtin_inff();
    });
  }

  template <class T>
  __attribute__((noinline)) void finish() const {
    const int64_t dim = a.v_dim;
    each_query([&](int64_t query, int64_t row, int64_t head) {
      const float* const from = scratch + at.out + query * at.v_stride;
      T* const out = static_cast<T*>(a.out) + row * a.out_row + head * a.out_head;
      const Vec total = splat(sum(load(scratch + at.sum + query * kPanel)));
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(out + d, load(from + d) / total);
      if (d < dim) store_n(out + d, load(from + d) / total, dim - d);
    });
  }

  // What a row reads of the block that starts at position `start`.
  KeyRange range_of(int64_t row, int64_t start) const {
    const int64_t last = a.position[row];
    const int64_t begin = first_key(a, last) - start, end = last + 1 - start;
    return {begin > 0 ? begin : 0, end < kAttentionBlock ? end : kAttentionBlock};
  }

  // Queries `first` to `first + count` of each of `heads` heads from `head` on.
  Strip strip_of(int64_t head, int64_t heads, int64_t first, int64_t count, int64_t start) const {
    Strip s;
    s.query = head * queries + first;
    s.heads = heads;
    s.count = count;
    s.all = {kAttentionBlock, 0};
    int64_t row = t.row + first / group, left = group - first % group;
    for (int64_t i = 0; i < count; ++i) {
      const KeyRange range = s.range[i] = range_of(row, start);
      if (--left == 0) {
        ++row;
        left = group;
      }
      if (range.begin >= range.end) continue;
      if (range.begin < s.all.begin) s.all.begin = range.begin;
      if (range.end > s.all.end) s.all.end = range.end;
    }
    for (int64_t i = count; i < s.queries(); ++i) s.range[i] = s.range[i - count];
    return s;
  }

  template <class T>
  __attribute__((noinline)) void score(const Strip& s, const Keys<T>& keys, float* scores) const {
    const float* const q = scratch + at.q + s.query * at.q_stride;
    const int64_t stride = at.q_stride, dim = a.k_dim;
    const int64_t panel = s.all.begin / kPanel, panels = (s.all.end + kPanel - 1) / kPanel;
    if (s.count == 1) {
      tile_heads(s.heads, panel, panels, [&](auto high, auto wide, int64_t h, int64_t p) {
        score_tile<decltype(high)::value, 1, decltype(wide)::value>(
            q + h * stride, stride, keys.of_head(h), p, dim, scores + h * kAttentionBlock);
      });
      return;
    }
    for (int64_t h = 0; h < s.heads; ++h)
      scores_of<kTileHeight>(q + h * s.count * stride, stride, s.count, keys.of_head(h), dim, panel,
                             panels, scores + h * s.count * kAttentionBlock);
  }

  // A strip's weighted values.
  template <class T>
  __attribute__((noinline)) void add_values(const Strip& s, const Values<T>& values,
                                            const float* weights, const float* factor) const {
    float* const out = scratch + at.out + s.query * at.v_stride;
    const int64_t stride = at.v_stride;
    if (s.count == 1) {
      tile_heads(s.heads, 0, value_panels, [&](auto high, auto wide, int64_t h, int64_t p) {
        value_tile<decltype(high)::value, 1, decltype(wide)::value>(
            {1, s.all, weights + h * kAttentionBlock, factor + h, out + h * stride},
            values.of_head(h), p, stride);
      });
      return;
    }
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t i = h * s.count;
      add_head_values(s.range, s.count, weights + i * kAttentionBlock, factor + i, out + i * stride,
                      values.of_head(h));
    }
  }

  // A segment ends where a query reads other keys than the one before: a value that a query must
  // not read would be multiplied by 0, but might be a NaN.
  template <class T>
  void add_head_values(const KeyRange* range, int64_t count, const float* weights,
                       const float* factor, float* out, const Values<T>& values) const {
    Segment segments[kStrip];
    int64_t made = 0, tallest = 0;
    for (int64_t i = 0; i < count;) {
      int64_t n = 1;
      while (i + n < count && n < kTileHeight && range[i + n].begin == range[i].begin &&
             range[i + n].end == range[i].end)
        ++n;
      if (range[i].begin < range[i].end)
        segments[made++] = {n, range[i], weights + i * kAttentionBlock, factor + i,
                            out + i * at.v_stride};
      if (n > tallest) tallest = n;
      i += n;
    }
    const int64_t step = tallest == 1 ? kPanels<1> : kPanels<kTileHeight>;
    for (int64_t panel = 0; panel < value_panels; panel += step) {
      const int64_t end = panel + step < value_panels ? panel + step : value_panels;
      for (int64_t s = 0; s < made; ++s)
        weigh_values<kTileHeight>(segments[s], values, panel, end, at.v_stride);
    }
  }

  // One block of keys for the queries of `heads` heads from `head` on; more than one head only
  // where keys and values are in place, and all their queries fit a strip.
  void attend_heads(const BlockPlaces& here, int64_t head, int64_t heads, int64_t start,
                    KeyRange block) const {
    const BlockPlaces& packed = reinterpret_cast<BlockPlaces*>(scratch + at.places)[1];
    const int64_t kv_head = t.kv_head + head;
    if (!keys_in_place)
      with_type(a.k_type, [&](auto k) {
        const int64_t at_head = kv_head * pages.key_head;
        if (pages.columns)
          widen_keys<decltype(k)>(here, at_head, block, a.k_dim, a.k_stride.dim, scratch + at.keys);
        else
          pack_keys<decltype(k)>(here, at_head, block, a.k_dim, scratch + at.keys);
      });
    if (!values_in_place)
      with_type(a.v_type, [&](auto v) {
        pack_values<decltype(v)>(here, kv_head * pages.value_head, block, a.v_dim,
                                 scratch + at.values);
      });
    float *const weights = scratch + at.weights, *const factor = scratch + at.factor;
    for (int64_t first = 0; first < queries; first += kStrip) {
      const int64_t left = queries - first;
      const Strip s = strip_of(head, heads, first, left < kStrip ? left : kStrip, start);
      if (s.all.begin >= s.all.end) continue;
      with_type(key_type, [&](auto k) {
        using K = decltype(k);
        const auto* const panel =
            reinterpret_cast<const K* const*>((keys_in_place ? here : packed).panel);
        const int64_t apart = a.k_stride.head;
        score(s,
              keys_in_place ? Keys<K>{panel, kv_head * apart, apart, a.k_stride.dim}
                            : Keys<K>{panel, 0, 0, kPanel},
              weights);
      });
      for (int64_t i = 0; i < s.queries(); i += kLanes) {
        const int64_t query = s.query + i, rest = s.queries() - i;
        weigh_scores(weights + i * kAttentionBlock, s.range + i, rest < kLanes ? rest : kLanes, cap,
                     scratch + at.top + query, scratch + at.sum + query * kPanel, factor + i);
      }
      with_type(value_type, [&](auto v) {
        using V = decltype(v);
        const auto* const rows =
            reinterpret_cast<const V* const*>((values_in_place ? here : packed).value);
        const int64_t apart = a.v_stride.head;
        add_values(s,
                   values_in_place ? Values<V>{rows, kv_head * apart, apart, kPanel}
                                   : Values<V>{rows, 0, 0, kAttentionBlock * kPanel},
                   weights, factor);
      });
    }
  }

  // Where pack_keys and pack_values put a block.
  void place_packed(BlockPlaces& packed) const {
    for (int64_t p = 0; p < kBlockPanels; ++p)
      packed.panel[p] = reinterpret_cast<const char*>(scratch + at.keys + p * a.k_dim * kPanel);
    for (int64_t j = 0; j < kAttentionBlock; ++j)
      packed.value[j] = reinterpret_cast<const char*>(scratch + at.values + j * kPanel);
  }

  void run() const {
    int64_t low = INT64_MAX, high = 0;  // keys that some row reads
    for (int64_t row = t.row; row < t.row + t.rows; ++row) {
      const int64_t last = a.position[row], first = first_key(a, last);
      if (first < low) low = first;
      if (last >= high) high = last + 1;
    }
    BlockPlaces* const places = reinterpret_cast<BlockPlaces*>(scratch + at.places);
    const bool in_place = keys_in_place && values_in_place;
    if (!in_place) place_packed(places[1]);
    const int64_t fit = kStrip / queries, together = in_place && fit > 1 ? fit : 1;
    for (int64_t start = low / kAttentionBlock * kAttentionBlock; start < high;
         start += kAttentionBlock) {
      const int64_t end = high - start;
      const KeyRange block = {low > start ? low - start : 0,
                              end < kAttentionBlock ? end : kAttentionBlock};
      pages.locate(start, block, places[0]);
      for (int64_t head = 0; head < t.kv_heads; head += together) {
        const int64_t left = t.kv_heads - head;
        attend_heads(places[0], head, left < together ? left : together, start, block);
      }
    }
  }
};

void attend(const PagedAttention& a, const AttentionTask& t, float* scratch) {
  const Walk walk{a, t, scratch};
  with_type(a.q_type, [&](auto q) { walk.begin<decltype(q)>(); });
  walk.run();
  with_type(a.q_type, [&](auto q) { walk.finish<decltype(q)>(); });
}

}  // namespace
}  // namespace effinfer
