// paged_attention over vec.h: one task. Its queries walk over the keys together, block by block,
// kTileHeight of them at a time against a block that lies in L1.
#pragma once
#include "ops/paged_attention/keys.h"
#include "ops/paged_attention/softmax.h"
#include "ops/paged_attention/tile.h"

namespace effinfer {
namespace {

// With so few queries, values are read where they lie: a copy would be used too seldom.
constexpr int64_t kFewQueries = 2 * kTileHeight;

template <class T>
__attribute__((noinline)) void load_queries(const PagedAttention& a, const AttentionTask& t,
                                            const AttentionScratch& at) {
  const int64_t group = a.q_heads / a.kv_heads, dim = a.k_dim;
  const float unit = a.softcap > 0.f ? a.scale / a.softcap : a.scale * kLog2E;
  float* to = t.scratch + at.q;
  for (int64_t row = t.row; row < t.row + t.rows; ++row)
    for (int64_t g = 0; g < group; ++g, to += at.q_stride) {
      const T* const q =
          static_cast<const T*>(a.q) + row * a.q_row + (t.kv_head * group + g) * a.q_head;
      for (int64_t d = 0; d < dim; d += kLanes)
        store(to + d, load_up_to(q + d, dim - d) * splat(unit));
    }
}

template <class T>
__attribute__((noinline)) void store_outputs(const PagedAttention& a, const AttentionTask& t,
                                             const AttentionScratch& at) {
  const int64_t group = a.q_heads / a.kv_heads, dim = a.v_dim;
  const float *from = t.scratch + at.out, *weights = t.scratch + at.sum;
  for (int64_t row = t.row; row < t.row + t.rows; ++row)
    for (int64_t g = 0; g < group; ++g, from += at.v_stride, weights += kPanel) {
      T* const out =
          static_cast<T*>(a.out) + row * a.out_row + (t.kv_head * group + g) * a.out_head;
      const Vec total = splat(sum(load(weights)));
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(out + d, load(from + d) / total);
      if (d < dim) store_n(out + d, load(from + d) / total, dim - d);
    }
}

// One block of keys, from position `start` on, as a task sees it.
struct Block {
  int64_t start;
  KeyRange range;     // that some row reads
  const float* keys;  // packed
};

// A task's walk over the keys.
struct Walk {
  const PagedAttention& a;
  const AttentionTask& t;
  const AttentionScratch at;
  const int64_t group = a.q_heads / a.kv_heads, queries = t.rows * group;
  const int64_t value_panels = (a.v_dim + kPanel - 1) / kPanel;
  const float cap = a.softcap > 0.f ? a.softcap* kLog2E : 0.f;

  // What query i reads of a block; begin >= end for nothing.
  KeyRange range_of(int64_t i, const Block& block) const {
    const int64_t last = a.position[t.row + i / group];
    const int64_t begin = first_key(a, last) - block.start, end = last + 1 - block.start;
    return {begin > 0 ? begin : 0, end < kAttentionBlock ? end : kAttentionBlock};
  }

  // R queries that read the same keys.
  template <int R, class T>
  void add_values(int64_t first, const float* weights, const float* factor, KeyRange range,
                  const Values<T>& values) const {
    weigh_values<R>(weights, factor, values, 0, value_panels, range.begin, range.end,
                    t.scratch + at.out + first * at.v_stride, at.v_stride);
  }

  // Queries first to first + R against a block.
  template <int R, class T>
  __attribute__((noinline)) void attend_tile(int64_t first, const Block& block,
                                             const Values<T>& values) const {
    float* const weights = t.scratch + at.weights;
    float* const factor = t.scratch + at.factor;
    KeyRange range[R], all = {kAttentionBlock, 0};
    for (int r = 0; r < R; ++r) {
      range[r] = range_of(first + r, block);
      if (range[r].begin >= range[r].end) continue;
      if (range[r].begin < all.begin) all.begin = range[r].begin;
      if (range[r].end > all.end) all.end = range[r].end;
    }
    if (all.begin >= all.end) return;
    scores_of<R>(t.scratch + at.q + first * at.q_stride, at.q_stride, block.keys, a.k_dim,
                 all.begin / kPanel, (all.end + kPanel - 1) / kPanel, weights);
    weigh<R>(first, range, weights, factor);
    bool same = true;
    for (int r = 0; r < R; ++r)
      same = same && range[r].begin == all.begin && range[r].end == all.end;
    if (same) {
      add_values<R>(first, weights, factor, all, values);
      return;
    }
    for (int r = 0; r < R; ++r)
      if (range[r].begin < range[r].end)
        add_values<1>(first + r, weights + r * kAttentionBlock, factor + r, range[r], values);
  }

  // Scores to weights, with the factors that what came before must take.
  template <int R>
  void weigh(int64_t first, const KeyRange (&range)[R], float* weights, float* factor) const {
    float* const top = t.scratch + at.top + first;
    float* const sums = t.scratch + at.sum + first * kPanel;
    float risen[R];
    for (int r = 0; r < R; ++r) {
      risen[r] = top[r];
      if (range[r].begin < range[r].end)
        risen[r] = mask_scores(weights + r * kAttentionBlock, range[r], cap, top[r]);
      factor[r] = top[r] - risen[r];
    }
    for (int r = 0; r < R; r += kLanes) store(factor + r, exp2(load(factor + r)));
    for (int r = 0; r < R; ++r) {
      if (range[r].begin >= range[r].end) continue;
      const Vec sum = exponentiate(weights + r * kAttentionBlock, range[r], risen[r]);
      store(sums + r * kPanel, fma(load(sums + r * kPanel), splat(factor[r]), sum));
      top[r] = risen[r];
    }
  }

  // All queries against a block, kTileHeight at a time and then the rest.
  template <int R, class T>
  void attend_block(int64_t first, const Block& block, const Values<T>& values) const {
    for (; first + R <= queries; first += R) attend_tile<R>(first, block, values);
    if constexpr (R > 1) {
      if (first < queries) attend_block<R - 1>(first, block, values);
    }
  }

  // Keys of the block from `start` on that some row reads, [low, high) being all of them.
  Block block_at(int64_t start, int64_t low, int64_t high) const {
    const int64_t end = high - start;
    return {start,
            {low > start ? low - start : 0, end < kAttentionBlock ? end : kAttentionBlock},
            t.scratch + at.keys};
  }

  void run() const {
    float* const packed = t.scratch + at.values;
    BlockRows* const rows = reinterpret_cast<BlockRows*>(t.scratch + at.rows);
    BlockRows& packed_rows = rows[2];
    for (int64_t j = 0; j < kAttentionBlock; ++j)
      packed_rows.value[j] = reinterpret_cast<const char*>(packed + j * kPanel);
    int64_t low = INT64_MAX, high = 0;
    for (int64_t row = t.row; row < t.row + t.rows; ++row) {
      const int64_t last = a.position[row], first = first_key(a, last);
      if (first < low) low = first;
      if (last >= high) high = last + 1;
    }
    const bool direct = queries <= kFewQueries && a.v_dim % kPanel == 0;
    const Pages pages(a, t.row, t.kv_head);
    Block block = block_at(low / kAttentionBlock * kAttentionBlock, low, high);
    pages.locate(block.start, block.range, rows[0]);
    for (int turn = 0;; turn ^= 1) {
      const BlockRows& here = rows[turn];
      const int64_t following = block.start + kAttentionBlock;
      const bool more = following < high;
      const Block next = more ? block_at(following, low, high) : block;
      if (more) pages.locate(next.start, next.range, rows[turn ^ 1]);
      const BlockRows& ahead = more ? rows[turn ^ 1] : here;
      with_type(a.k_type, [&](auto k) {
        pack_keys<decltype(k)>(here, ahead, block.range, a.k_dim, t.scratch + at.keys);
      });
      with_type(a.v_type, [&](auto v) {
        using V = decltype(v);
        if (direct) {
          attend_block<kTileHeight>(
              0, block, Values<V>{reinterpret_cast<const V* const*>(here.value), kPanel});
          return;
        }
        pack_values<V>(here, block.range, a.v_dim, packed);
        attend_block<kTileHeight>(
            0, block,
            Values<float>{reinterpret_cast<const float* const*>(packed_rows.value),
                          kAttentionBlock * kPanel});
      });
      if (!more) return;
      block = next;
    }
  }
};

void attend(const PagedAttention& a, const AttentionTask& t) {
  const AttentionScratch at(a);
  const int64_t queries = t.rows * (a.q_heads / a.kv_heads);
  for (int64_t i = 0; i < queries; ++i) t.scratch[at.top + i] = -__builtin_inff();
  const auto clear = [&](int64_t from, int64_t floats) {
    __builtin_memset(t.scratch + from, 0, static_cast<size_t>(floats) * sizeof(float));
  };
  clear(at.sum, queries * kPanel);
  clear(at.out, queries * at.v_stride);
  with_type(a.q_type, [&](auto q) { load_queries<decltype(q)>(a, t, at); });
  Walk{a, t, at}.run();
  with_type(a.q_type, [&](auto q) { store_outputs<decltype(q)>(a, t, at); });
}

}  // namespace
}  // namespace effinfer
