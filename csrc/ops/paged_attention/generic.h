// paged_attention over vec.h: one task. Its queries walk over the keys together, block by block and
// kv head by kv head, a strip of queries at a time against a block that lies in L1.
#pragma once
#include "ops/paged_attention/keys.h"
#include "ops/paged_attention/softmax.h"
#include "ops/paged_attention/tile.h"

namespace effinfer {
namespace {

// With so few queries, values are read where they lie: a copy would be used too seldom.
constexpr int64_t kFewQueries = 2 * kTileHeight;

// A task's walk over the keys.
struct Walk {
  const PagedAttention& a;
  const AttentionTask& t;
  float* const scratch;
  const AttentionScratch at{a};
  const int64_t group = queries_per_row(a), queries = t.rows * group;  // of one kv head
  const int64_t value_panels = (a.v_dim + kPanel - 1) / kPanel;
  const float cap = a.softcap > 0.f ? a.softcap* kLog2E : 0.f;

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

  // Queries first to first + count of a head against one block of keys.
  template <class T>
  __attribute__((noinline)) void attend_strip(int64_t head, int64_t first, int64_t count,
                                              int64_t start, const Values<T>& values) const {
    KeyRange range[kStrip], all = {kAttentionBlock, 0};
    int64_t row = t.row + first / group, left = group - first % group;
    for (int64_t i = 0; i < count; ++i) {
      range[i] = range_of(row, start);
      if (--left == 0) {
        ++row;
        left = group;
      }
      if (range[i].begin >= range[i].end) continue;
      if (range[i].begin < all.begin) all.begin = range[i].begin;
      if (range[i].end > all.end) all.end = range[i].end;
    }
    if (all.begin >= all.end) return;
    float* const weights = scratch + at.weights;
    float* const factor = scratch + at.factor;
    const int64_t query = head * queries + first;
    scores_of<kTileHeight>(scratch + at.q + query * at.q_stride, at.q_stride, count,
                           scratch + at.keys, a.k_dim, all.begin / kPanel,
                           (all.end + kPanel - 1) / kPanel, weights);
    for (int64_t i = 0; i < count; i += kLanes)
      weigh_scores(weights + i * kAttentionBlock, range + i,
                   count - i < kLanes ? count - i : kLanes, cap, scratch + at.top + query + i,
                   scratch + at.sum + (query + i) * kPanel, factor + i);
    add_values(range, count, weights, factor, scratch + at.out + query * at.v_stride, values);
  }

  // A strip's weighted values. A segment ends where a query reads other keys than the one before:
  // a value that a query must not read would be multiplied by 0, but might be a NaN.
  template <class T>
  EFFINFER_INLINE void add_values(const KeyRange* range, int64_t count, const float* weights,
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

  template <class T>
  void attend_block(int64_t head, int64_t start, const Values<T>& values) const {
    for (int64_t first = 0; first < queries; first += kStrip)
      attend_strip(head, first, queries - first < kStrip ? queries - first : kStrip, start, values);
  }

  // One block of keys of one kv head, for all its queries.
  void attend_unit(const Unit& unit, const Ahead& ahead, int64_t head, int64_t start,
                   KeyRange range, const BlockRows& packed_rows) const {
    float* const packed = scratch + at.values;
    with_type(a.k_type, [&](auto k) {
      pack_keys<decltype(k)>(unit, ahead, range, a.k_dim, scratch + at.keys);
    });
    const bool direct = queries <= kFewQueries && a.v_dim % kPanel == 0;
    with_type(a.v_type, [&](auto v) {
      using V = decltype(v);
      if (direct) {
        attend_block(head, start,
                     Values<V>{reinterpret_cast<const V* const*>(unit.rows->value),
                               unit.value_head / static_cast<int64_t>(sizeof(V)), kPanel});
        return;
      }
      pack_values<V>(unit, range, a.v_dim, packed);
      attend_block(head, start,
                   Values<float>{reinterpret_cast<const float* const*>(packed_rows.value), 0,
                                 kAttentionBlock * kPanel});
    });
  }

  void run() const {
    int64_t low = INT64_MAX, high = 0;  // keys that some row reads
    for (int64_t row = t.row; row < t.row + t.rows; ++row) {
      const int64_t last = a.position[row], first = first_key(a, last);
      if (first < low) low = first;
      if (last >= high) high = last + 1;
    }
    BlockRows* const rows = reinterpret_cast<BlockRows*>(scratch + at.rows);
    BlockRows& packed_rows = rows[2];
    for (int64_t j = 0; j < kAttentionBlock; ++j)
      packed_rows.value[j] = reinterpret_cast<const char*>(scratch + at.values + j * kPanel);
    const Pages pages(a, t.row);
    const auto range_at = [&](int64_t start) -> KeyRange {
      const int64_t end = high - start;
      return {low > start ? low - start : 0, end < kAttentionBlock ? end : kAttentionBlock};
    };
    const int64_t key_bytes = a.k_dim * size_of(a.k_type);
    const int64_t value_bytes = a.v_dim * size_of(a.v_type);
    const bool adjacent = pages.key_head == key_bytes && pages.value_head == value_bytes;
    int64_t start = low / kAttentionBlock * kAttentionBlock;
    pages.locate(start, range_at(start), rows[0]);
    for (int turn = 0; start < high; start += kAttentionBlock, turn ^= 1) {
      const int64_t following = start + kAttentionBlock;
      const BlockRows& here = rows[turn];
      const BlockRows& next = following < high ? rows[turn ^ 1] : here;
      if (following < high) pages.locate(following, range_at(following), rows[turn ^ 1]);
      for (int64_t head = 0; head < t.kv_heads; ++head) {
        const Unit unit = {&here, (t.kv_head + head) * pages.key_head,
                           (t.kv_head + head) * pages.value_head};
        Ahead ahead = {&next, 0, 1, unit.key_head, unit.value_head, key_bytes, value_bytes};
        if (adjacent)
          ahead = {&next,
                   head,
                   t.kv_heads,
                   t.kv_head * key_bytes,
                   t.kv_head * value_bytes,
                   t.kv_heads * key_bytes,
                   t.kv_heads * value_bytes};
        attend_unit(unit, ahead, head, start, range_at(start), packed_rows);
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
