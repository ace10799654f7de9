// What comes between a fused projection and attention: rotary position embedding of q and k in
// place (RoPE, arXiv 2104.09864), and k and v into their pages.
//
//   x'[i] = x[i] cos[i] + r[i] sin[i]   for i < rotary_dim of each head of q and k
//       halves:      r[i] = -x[i + rotary_dim / 2] in the first half, x[i - rotary_dim / 2] after
//       interleaved: r[i] = -x[i + 1] where i is even, x[i - 1] where it is odd
//   k_pages[plane][slot], v_pages[plane][slot] = k', v
//
// Both products and the sum are rounded to float32: the bits of transformers' float32 models. A
// slot is block * block_size + offset; a negative one writes nothing, a negative position rotates
// nothing. No two rows may name one slot of a plane.
// Cost: bytes: q, k read and written, v read, the slots written.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

// Pages as an op writes them: [planes, blocks, block_size, kv_heads, dim], strides in elements.
// Keys may be rows or columns (paged_attention.h).
struct WrittenPages {
  void* data;
  int64_t dim, plane_stride, block_stride, slot_stride, head_stride, dim_stride;
  DType type;
};

struct RopeWrite {
  void* qkv;                // [rows, (q_heads + kv_heads) * k.dim + kv_heads * v.dim]
  const float *cos, *sin;   // [lines, rotary_dim], or null for no rotation
  const int32_t* position;  // [rows], which line of cos and sin; null for row r's own line r
  const int32_t* slot;      // [rows]
  const int32_t* plane;     // [rows], or null for plane 0
  WrittenPages k, v;
  int64_t rows, q_heads, kv_heads, rotary_dim, lines, planes, blocks, block_size;
  int64_t qkv_row, cos_row, sin_row;  // strides in elements
  DType type;                         // of qkv
  bool interleaved;
};

using RopeWriteFn = void (*)(const RopeWrite&, int64_t row_begin, int64_t row_end);

const Kernel<RopeWriteFn>& rope_write_kernel();
void rope_write(const RopeWrite& args);

void rope_write_scalar(const RopeWrite&, int64_t, int64_t);
void rope_write_avx2(const RopeWrite&, int64_t, int64_t);
void rope_write_avx512(const RopeWrite&, int64_t, int64_t);
void rope_write_neon(const RopeWrite&, int64_t, int64_t);

int rope_write_cuda(const RopeWrite&, void* stream);  // a cudaError_t

}  // namespace effinfer
