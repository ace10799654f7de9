// Pages of keys or values, as every op that reads or writes them takes them.
#pragma once
#include "ops/paged_attention/paged_attention.h"
#include "python/checks.h"

namespace effinfer {

// (blocks, block_size, kv_heads, dim), or with a leading dimension of planes.
struct PageTensor {
  Tensor tensor;
  int64_t planes, blocks, block_size, kv_heads, dim;
  int64_t plane_stride, block_stride, slot_stride, head_stride, dim_stride;
};

inline PageTensor want_pages(const char* op, const char* arg, py::handle object) {
  const Tensor t = want(op, arg, object, kFloats);
  if (t.ndim != 4 && t.ndim != 5)
    reject(op, arg, "have shape ([planes,] blocks, block_size, kv_heads, head_dim)", shape_text(t));
  const int at = t.ndim - 4;
  const PageTensor pages = {
      .tensor = t,
      .planes = at == 1 ? t.shape[0] : 1,
      .blocks = t.shape[at],
      .block_size = t.shape[at + 1],
      .kv_heads = t.shape[at + 2],
      .dim = t.shape[at + 3],
      .plane_stride = at == 1 ? t.stride[0] : 0,
      .block_stride = t.stride[at],
      .slot_stride = t.stride[at + 1],
      .head_stride = t.stride[at + 2],
      .dim_stride = t.stride[at + 3],
  };
  if (pages.block_size < 1 || pages.kv_heads < 1 || pages.dim < 1)
    reject(op, arg, "have at least one slot, head and element", shape_text(t));
  return pages;
}

// Pages of keys: rows, dense in dim, or columns, dense in slots (PageStrides).
inline PageTensor want_key_pages(const char* op, py::handle object) {
  const PageTensor keys = want_pages(op, "k_pages", object);
  const bool rows = keys.dim_stride == 1 || keys.dim == 1;
  const bool columns = keys.slot_stride == 1 && keys.block_size % kKeyPanel == 0;
  if (!rows && !columns)
    reject(op, "k_pages",
           "be contiguous in its last dimension, or in its slots and have a multiple of " +
               std::to_string(kKeyPanel) + " of them",
           "strides of another kind");
  return keys;
}

// As many pages of values, dense in dim.
inline PageTensor want_value_pages(const char* op, py::handle object, const PageTensor& keys) {
  const PageTensor values = want_pages(op, "v_pages", object);
  if (values.planes != keys.planes || values.blocks != keys.blocks ||
      values.block_size != keys.block_size || values.kv_heads != keys.kv_heads)
    reject(op, "v_pages",
           "have as many planes, blocks, slots and heads as k_pages " + shape_text(keys.tensor),
           shape_text(values.tensor));
  if (values.dim_stride != 1 && values.dim > 1)
    reject(op, "v_pages", "be contiguous in its last dimension", "strides of another kind");
  return values;
}

// One number per row, each in [0, limit), for rows that `counts` says count; contiguous.
template <class Counts>
Tensor want_numbers(const char* op, const char* arg, py::handle object, int64_t rows, int64_t limit,
                    Counts&& counts) {
  const Tensor t = want_dense(op, arg, object, kI32, {rows});
  if (!t || !kIndicesReadable) return t;
  const auto* at = t.as<const int32_t>();
  for (int64_t i = 0; i < rows; ++i)
    if (counts(i) && (at[i] < 0 || at[i] >= limit))
      reject(op, arg, "be in [0, " + std::to_string(limit) + ")", std::to_string(at[i]));
  return t;
}

}  // namespace effinfer
