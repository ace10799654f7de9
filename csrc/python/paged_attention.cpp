#include "ops/paged_attention/paged_attention.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"
#include "python/pages.h"
#include "python/tensor.h"

namespace effinfer::paged_attention_binding {

constexpr auto kOp = "paged_attention";

PageStrides page_strides(const PageTensor& p) {
  return {p.plane_stride, p.block_stride, p.slot_stride, p.head_stride, p.dim_stride};
}

// Every block that a row reads must be in the pool. Rows of one sequence, one after another, have
// most of their blocks in common: only what the row before did not read is looked at.
void check_blocks(const PagedAttention& a) {
  int64_t sequence = -1, from = 0, to = 0;  // entries [from, to) of this sequence are good
  const auto check = [&](const int32_t* line, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (line[i] < 0 || line[i] >= a.blocks)
        reject(kOp, "block_table",
               "name blocks in [0, " + std::to_string(a.blocks) + ") where a row reads",
               std::to_string(line[i]));
  };
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t position = a.position[row];
    if (position < 0) continue;
    const int64_t end = position / a.block_size + 1;
    if (end > a.max_blocks)
      reject(
          kOp, "position",
          "be below " + std::to_string(a.max_blocks) + " blocks of " + std::to_string(a.block_size),
          std::to_string(position));
    const int64_t first = a.window > 0 ? std::max<int64_t>(position - a.window + 1, 0) : 0;
    const int64_t begin = first / a.block_size;
    const int32_t* const line = a.block_table + a.sequence[row] * a.table_row;
    if (a.sequence[row] == sequence && begin >= from && begin <= to) {
      check(line, to, end);
      to = std::max(to, end);
    } else {
      check(line, begin, end);
      sequence = a.sequence[row];
      from = begin;
      to = end;
    }
  }
}

void run(py::handle q_, py::handle k_pages_, py::handle v_pages_, py::handle block_table_,
         py::handle seq_of_row_, py::handle position_, py::handle plane_, double scale,
         int64_t window, double softcap, py::handle out_) {
  const Tensor q = want(kOp, "q", q_, kFloats, {kAny, kAny, kAny});
  const int64_t rows = q.shape[0], q_heads = q.shape[1], k_dim = q.shape[2];
  if (q.stride[2] != 1 && k_dim > 1)
    reject(kOp, "q", "be contiguous in its last dimension", "strides of another kind");
  const PageTensor k = want_key_pages(kOp, k_pages_);
  if (k.dim != k_dim)
    reject(kOp, "k_pages", "have head_dim " + std::to_string(k_dim) + " like q",
           shape_text(k.tensor));
  if (q_heads % k.kv_heads != 0)
    reject(kOp, "q", "have a multiple of " + std::to_string(k.kv_heads) + " heads", shape_text(q));
  const PageTensor v = want_value_pages(kOp, v_pages_, k);
  const Tensor table = want(kOp, "block_table", block_table_, kI32, {kAny, kAny});
  if (table.stride[1] != 1 && table.shape[1] > 1)
    reject(kOp, "block_table", "have contiguous rows", "strides of another kind");
  const Tensor position = want_array(kOp, "position", position_, kI32, {rows});
  const auto* const at = position.as<const int32_t>();
  const auto is_row = [at](int64_t row) { return at[row] >= 0; };
  const Tensor sequence =
      want_numbers(kOp, "seq_of_row", seq_of_row_, rows, table.shape[0], is_row);
  if (!sequence) reject(kOp, "seq_of_row", "be given", "None");
  const Tensor plane = want_numbers(kOp, "plane", plane_, rows, k.planes, is_row);
  if (window < 0) reject(kOp, "window", "be 0 or more", std::to_string(window));
  if (!(softcap >= 0) || std::isinf(softcap))
    reject(kOp, "softcap", "be 0 or more and finite", std::to_string(softcap));
  const Tensor out = want(kOp, "out", out_, q.type, {rows, q_heads, v.dim});
  if (out.stride[2] != 1 && v.dim > 1)
    reject(kOp, "out", "be contiguous in its last dimension", "strides of another kind");
  want_writable(kOp, "out", out);
  PagedAttention args = {
      .q = q.data,
      .k_pages = k.tensor.data,
      .v_pages = v.tensor.data,
      .block_table = table.as<const int32_t>(),
      .sequence = sequence.as<const int32_t>(),
      .position = position.as<const int32_t>(),
      .plane = plane.as<const int32_t>(),
      .out = out.data,
      .rows = rows,
      .q_heads = q_heads,
      .kv_heads = k.kv_heads,
      .k_dim = k_dim,
      .v_dim = v.dim,
      .planes = k.planes,
      .blocks = k.blocks,
      .block_size = k.block_size,
      .sequences = table.shape[0],
      .max_blocks = table.shape[1],
      .q_row = q.stride[0],
      .q_head = q.stride[1],
      .out_row = out.stride[0],
      .out_head = out.stride[1],
      .table_row = table.stride[0],
      .k_stride = page_strides(k),
      .v_stride = page_strides(v),
      .q_type = q.dtype(),
      .k_type = k.tensor.dtype(),
      .v_type = v.tensor.dtype(),
      .scale = static_cast<float>(scale),
      .softcap = static_cast<float>(softcap),
      .window = window,
      .slots = num_threads(),
      .scratch = nullptr,
  };
  if (kIndicesReadable) check_blocks(args);
#if !defined(EFFINFER_CUDA_MODULE)
  args.scratch = workspace(paged_attention_scratch(args));
#endif
  RUN(paged_attention, args, q);
}

void bind(Module& m) { m.def<&run>("paged_attention"); }

}  // namespace effinfer::paged_attention_binding
