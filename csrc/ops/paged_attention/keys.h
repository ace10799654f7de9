// A block's keys and values: where they lie, and copies of them in the order the tiles want.
#pragma once
#include "base/vec.h"
#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

// One sequence's pages of one plane. Strides in bytes.
struct Pages {
  const int32_t* blocks;
  const char *keys, *values;
  int64_t block_size, key_block, key_slot, key_head, value_block, value_slot, value_head;

  Pages(const PagedAttention& a, int64_t row) {
    const int64_t plane = a.plane != nullptr ? a.plane[row] : 0;
    const int64_t k = size_of(a.k_type), v = size_of(a.v_type);
    blocks = a.block_table + a.sequence[row] * a.table_row;
    keys = static_cast<const char*>(a.k_pages) + plane * a.k_stride.plane * k;
    values = static_cast<const char*>(a.v_pages) + plane * a.v_stride.plane * v;
    block_size = a.block_size;
    key_block = a.k_stride.block * k;
    key_slot = a.k_stride.slot * k;
    key_head = a.k_stride.head * k;
    value_block = a.v_stride.block * v;
    value_slot = a.v_stride.slot * v;
    value_head = a.v_stride.head * v;
  }

  // The rows, for kv head 0, of those keys of the block that starts at position `start`; every
  // other entry is the nearest of them, which may be read and counts for nothing.
  void locate(int64_t start, KeyRange range, BlockRows& rows) const {
    const int64_t begin = range.begin, end = range.end;
    int64_t page = (start + begin) / block_size, slot = (start + begin) % block_size;
    for (int64_t j = begin; j < end; ++page, slot = 0) {
      const int64_t left = block_size - slot, stop = left < end - j ? j + left : end;
      const char* key = keys + blocks[page] * key_block + slot * key_slot;
      const char* value = values + blocks[page] * value_block + slot * value_slot;
      for (; j < stop; ++j, key += key_slot, value += value_slot) {
        rows.key[j] = key;
        rows.value[j] = value;
      }
    }
    for (int64_t j = 0; j < begin; ++j) {
      rows.key[j] = rows.key[begin];
      rows.value[j] = rows.value[begin];
    }
    for (int64_t j = end; j < kAttentionBlock; ++j) {
      rows.key[j] = rows.key[end - 1];
      rows.value[j] = rows.value[end - 1];
    }
  }
};

constexpr int64_t kLine = 64;

// One block of keys of one kv head: `rows`, so many bytes further.
struct Unit {
  const BlockRows* rows;
  int64_t key_head, value_head;
};

// What a packing loop asks for on its way: its share of the next block's rows. Where the kv heads
// of a task lie side by side, that is some rows for all of them, in memory's order: head by head
// would open every DRAM page again for each, and the hardware cannot foresee where pages lie.
struct Ahead {
  const BlockRows* next;
  int64_t share, shares;         // of the block's rows: this unit's and how many units
  int64_t key_head, value_head;  // where in a row, in bytes
  int64_t key_bytes, value_bytes;

  // For keys j to j + kLanes of the unit.
  EFFINFER_INLINE void prefetch(int64_t j) const {
    const int64_t begin = (share * kAttentionBlock + j) / shares;
    const int64_t end = (share * kAttentionBlock + j + kLanes) / shares;
    for (int64_t row = begin; row < end; ++row) {
      const char *const key = next->key[row] + key_head, *const value =
                                                             next->value[row] + value_head;
      for (int64_t at = 0; at < key_bytes; at += kLine) __builtin_prefetch(key + at, 0, 2);
      for (int64_t at = 0; at < value_bytes; at += kLine) __builtin_prefetch(value + at, 0, 2);
    }
  }
};

template <class T>
EFFINFER_INLINE Vec load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, left);
}

// The panels of keys that `range` touches as [panel][d][kPanel]: lanes are keys.
template <class T>
__attribute__((noinline)) void pack_keys(const Unit& unit, const Ahead& ahead, KeyRange range,
                                         int64_t dim, float* to) {
  const int64_t end = round_up(range.end, kPanel);
  for (int64_t j = range.begin / kPanel * kPanel; j < end; j += kLanes) {
    const T* key[kLanes];
    EFFINFER_UNROLL
    for (int i = 0; i < kLanes; ++i)
      key[i] = reinterpret_cast<const T*>(unit.rows->key[j + i] + unit.key_head);
    ahead.prefetch(j);
    float* const columns = to + j / kPanel * dim * kPanel + j % kPanel;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      Vec m[kLanes];
      EFFINFER_UNROLL
      for (int i = 0; i < kLanes; ++i) m[i] = load(key[i] + d);
      transpose(m);
      EFFINFER_UNROLL
      for (int i = 0; i < kLanes; ++i) store(columns + (d + i) * kPanel, m[i]);
    }
    if (d == dim) continue;
    Vec m[kLanes];
    EFFINFER_UNROLL
    for (int i = 0; i < kLanes; ++i) m[i] = load_n(key[i] + d, dim - d);
    transpose(m);
    for (int64_t i = 0; d + i < dim; ++i) store(columns + (d + i) * kPanel, m[i]);
  }
}

// Their values as [panel of dimensions][key][kPanel], zeros past `dim`.
template <class T>
__attribute__((noinline)) void pack_values(const Unit& unit, KeyRange range, int64_t dim,
                                           float* to) {
  for (int64_t j = range.begin; j < range.end; ++j) {
    const T* const value = reinterpret_cast<const T*>(unit.rows->value[j] + unit.value_head);
    for (int64_t d = 0; d < dim; d += kPanel) EFFINFER_UNROLL
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      const int64_t left = dim - d - v;
      store(to + (d * kAttentionBlock) + j * kPanel + v,
            left > 0 ? load_up_to(value + d + v, left) : Vec{});
    }
  }
}

}  // namespace
}  // namespace effinfer
