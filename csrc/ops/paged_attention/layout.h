// What a row reads, and where the parts of a thread's scratch lie.
#pragma once
#include "ops/paged_attention/paged_attention.h"

namespace effinfer {
namespace {

constexpr int64_t kPanel = kKeyPanel;  // keys, or dimensions of a value, side by side in a panel
constexpr int64_t kBlockPanels = kAttentionBlock / kPanel;
constexpr int64_t kTileHeight = 6;    // queries of the tallest register tile
constexpr int64_t kStrip = 24;        // queries that meet a block together: all of it stays in L1
constexpr int64_t kMostQueries = 96;  // of a task: with a block of keys they stay in L2

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The first key that a row at `position` attends to.
constexpr int64_t first_key(const PagedAttention& a, int64_t position) {
  return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

constexpr int64_t queries_per_row(const PagedAttention& a) { return a.q_heads / a.kv_heads; }

// The most rows of a task, and the most kv heads for so many rows.
constexpr int64_t most_rows(const PagedAttention& a) {
  const int64_t fit = kMostQueries / queries_per_row(a);
  return fit > 1 ? fit : 1;
}
constexpr int64_t most_heads(const PagedAttention& a, int64_t rows) {
  const int64_t fit = most_rows(a) / rows;
  return fit < a.kv_heads ? fit : a.kv_heads;
}

// Keys [begin, end) of a block, counted from its start.
struct KeyRange {
  int64_t begin, end;
};

// Whether keys can be read where they lie.
constexpr bool keys_in_columns(const PagedAttention& a) {
  return a.k_stride.slot == 1 && a.block_size % kPanel == 0;
}

// Where a block's keys and values lie in memory, for one kv head.
struct BlockPlaces {
  const char* panel[kBlockPanels];   // keys in columns, panel by panel
  const char* key[kAttentionBlock];  // keys in rows, one by one
  const char* value[kAttentionBlock];
};

// In floats. A "query" is one row's one query head; they come head by head of the task, then row by
// row.
struct AttentionScratch {
  int64_t q_stride, v_stride;
  int64_t q;        // [query][k_dim], scaled
  int64_t out;      // [query][v_dim], not yet divided by the sum of weights
  int64_t sum;      // [query][kPanel]: each lane's part of the sum of weights
  int64_t top;      // [query]: the largest score so far
  int64_t factor;   // [kStrip]: what a block's rise of `top` makes of what came before
  int64_t weights;  // [kStrip][kAttentionBlock]: scores, then weights
  int64_t keys;     // [panel of keys][k_dim][kPanel]
  int64_t values;   // [panel of v_dim][key][kPanel]
  int64_t places;   // two BlockPlaces: of a block in its pages, and of what is packed here
  int64_t total_floats;

  explicit AttentionScratch(const PagedAttention& a) {
    const int64_t queries = most_rows(a) * queries_per_row(a);
    q_stride = round_up(a.k_dim, kPanel) + kPanel;  // off the powers of two, which share cache sets
    v_stride = round_up(a.v_dim, kPanel);
    int64_t at = 0;
    const auto take = [&at](int64_t floats) {
      const int64_t begin = at;
      at += round_up(floats, kPanel);
      return begin;
    };
    q = take(queries * q_stride);
    out = take(queries * v_stride);
    sum = take(queries * kPanel);
    top = take(queries);
    factor = take(round_up(kStrip, kPanel));
    weights = take(kStrip * kAttentionBlock);
    keys = take(kAttentionBlock * a.k_dim);
    values = take(kAttentionBlock * v_stride);
    places = take(2 * static_cast<int64_t>(sizeof(BlockPlaces) / sizeof(float)));
    total_floats = at;
  }
};

}  // namespace
}  // namespace effinfer
