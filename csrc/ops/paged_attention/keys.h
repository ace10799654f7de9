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
  bool columns;

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
    columns = keys_in_columns(a);
  }

  // The places, for kv head 0, of those keys and values of the block that starts at position
  // `start`. Keys come in whole panels: one beside the range is the nearest in it where keys are
  // rows, and its neighbour in the page where they are columns. It may be read and counts for
  // nothing.
  void locate(int64_t start, KeyRange range, BlockPlaces& places) const {
    const int64_t begin = range.begin, end = range.end;
    int64_t page = (start + begin) / block_size, slot = (start + begin) % block_size;
    for (int64_t j = begin; j < end; ++page, slot = 0) {
      const int64_t left = block_size - slot, stop = left < end - j ? j + left : end;
      const char* const page_keys = keys + blocks[page] * key_block;
      const char* value = values + blocks[page] * value_block + slot * value_slot;
      if (columns) {
        for (int64_t p = j / kPanel; p * kPanel < stop; ++p)
          places.panel[p] = page_keys + (p * kPanel - j + slot) * key_slot;
      } else {
        for (int64_t i = j; i < stop; ++i) places.key[i] = page_keys + (i - j + slot) * key_slot;
      }
      for (; j < stop; ++j, value += value_slot) places.value[j] = value;
    }
    if (columns) return;
    for (int64_t j = begin / kPanel * kPanel; j < begin; ++j) places.key[j] = places.key[begin];
    for (int64_t j = end; j % kPanel != 0; ++j) places.key[j] = places.key[end - 1];
  }
};

template <class T>
EFFINFER_INLINE Vec load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_n(p, left);
}

// The panels of keys in rows that `range` touches as [panel][d][kPanel]: lanes are keys. Keys lie
// `head` bytes further than their places.
template <class T>
__attribute__((noinline)) void pack_keys(const BlockPlaces& places, int64_t head, KeyRange range,
                                         int64_t dim, float* to) {
  const int64_t end = round_up(range.end, kPanel);
  for (int64_t j = range.begin / kPanel * kPanel; j < end; j += kLanes) {
    const T* key[kLanes];
    EFFINFER_UNROLL
    for (int i = 0; i < kLanes; ++i) key[i] = reinterpret_cast<const T*>(places.key[j + i] + head);
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

// The same from keys in columns, whose dimensions are `dim_stride` elements apart.
template <class T>
__attribute__((noinline)) void widen_keys(const BlockPlaces& places, int64_t head, KeyRange range,
                                          int64_t dim, int64_t dim_stride, float* to) {
  for (int64_t p = range.begin / kPanel; p * kPanel < range.end; ++p) {
    const T* const from = reinterpret_cast<const T*>(places.panel[p] + head);
    float* const columns = to + p * dim * kPanel;
    for (int64_t d = 0; d < dim; ++d) EFFINFER_UNROLL
    for (int64_t v = 0; v < kPanel; v += kLanes)
      store(columns + d * kPanel + v, load(from + d * dim_stride + v));
  }
}

// Their values as [panel of dimensions][key][kPanel], zeros past `dim`.
template <class T>
__attribute__((noinline)) void pack_values(const BlockPlaces& places, int64_t head, KeyRange range,
                                           int64_t dim, float* to) {
  for (int64_t j = range.begin; j < range.end; ++j) {
    const T* const value = reinterpret_cast<const T*>(places.value[j] + head);
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
