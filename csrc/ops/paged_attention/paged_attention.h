// Causal softmax attention over keys and values that lie in pages (PagedAttention, arXiv
// 2309.06180).
//
//   out[row, h] = sum_t softmax_t(cap(scale q[row, h] . k[t, h / group])) v[t, h / group]
//       t from max(0, position - window + 1) to position of the row's sequence (window 0: from 0)
//       cap(x) = softcap tanh(x / softcap), or x where softcap is 0
//       k[t] lies in page block_table[sequence, t / block_size], slot t % block_size, of the row's
//       plane
//
// A row at a negative position is padding: its output is 0 and nothing of its sequence is read.
//
// Keys are taken in blocks of kAttentionBlock positions, counted from the sequence's start, in
// ascending order: each block has one running maximum, and its weighted values are summed before
// they join the row's (online softmax, arXiv 1805.02867). Nothing but a row's own range enters its
// sums, in one order; so its bits depend neither on the other rows, nor on how the prompt was cut,
// on the pages' places, or on the threads.
//
// Adjacent rows of one sequence and plane whose ranges meet are a tile: they read a block of keys
// once, for all query heads that share it. A task is a tile and some of the kv heads.
//
// Cost: 2 (k_dim + v_dim) flops per query head and key; bytes: a tile's keys and values once.
#pragma once
#include <cstddef>

#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

constexpr int64_t kAttentionBlock = 64;
constexpr int64_t kKeyPanel = 16;  // positions that are read together

// In elements. Values have dense dimensions. Keys have them too ("rows"), or else dense slots
// ("columns"), of which a page then has a multiple of kKeyPanel: so the kernels want them, for
// their lanes are positions, and keys in rows are transposed at every read.
struct PageStrides {
  int64_t plane, block, slot, head, dim;
};

struct PagedAttention {
  const void* q;               // [rows, q_heads, k_dim]
  const void* k_pages;         // [planes, blocks, block_size, kv_heads, k_dim]
  const void* v_pages;         // [planes, blocks, block_size, kv_heads, v_dim]
  const int32_t* block_table;  // [sequences, max_blocks]
  const int32_t* sequence;     // [rows]
  const int32_t* position;     // [rows], negative for padding
  const int32_t* plane;        // [rows], or null for plane 0
  void* out;                   // [rows, q_heads, v_dim] in q's type
  int64_t rows, q_heads, kv_heads, k_dim, v_dim;
  int64_t planes, blocks, block_size, sequences, max_blocks;
  int64_t q_row, q_head, out_row, out_head, table_row;  // strides in elements
  PageStrides k_stride, v_stride;
  DType q_type, k_type, v_type;
  float scale, softcap;
  int64_t window;  // 0 for all
  // CPU kernels only: how many threads may work, and paged_attention_scratch() bytes, 64-byte
  // aligned.
  int64_t slots;
  void* scratch;
};

// `rows` rows from `row` on, `kv_heads` heads from `kv_head` on.
struct AttentionTask {
  int32_t row, rows, kv_head, kv_heads;
};

// `scratch` is the thread's own.
using PagedAttentionFn = void (*)(const PagedAttention&, const AttentionTask&, float* scratch);

const Kernel<PagedAttentionFn>& paged_attention_kernel();
size_t paged_attention_scratch(const PagedAttention& args);  // reads the sizes and slots
void paged_attention(const PagedAttention& args);

void paged_attention_scalar(const PagedAttention&, const AttentionTask&, float*);
void paged_attention_avx2(const PagedAttention&, const AttentionTask&, float*);
void paged_attention_avx512(const PagedAttention&, const AttentionTask&, float*);
void paged_attention_neon(const PagedAttention&, const AttentionTask&, float*);

int paged_attention_cuda(const PagedAttention&, void* stream);  // a cudaError_t

}  // namespace effinfer
