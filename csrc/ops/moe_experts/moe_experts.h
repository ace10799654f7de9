// The experts of a mixture (arXiv 1701.06538), each row through its own few of them:
//
//   y[t] = sum over r of weight[t, r] * down_e(act(gate_e x[t]) * up_e x[t]),  e = index[t, r]
//
// or down_e(act(up_e x[t])) where experts have no gate. Pairs (t, r) are put in order of their
// expert by a counting sort, so each expert is one product over all its rows and its weights are
// read once (MegaBlocks, arXiv 2211.15841). Weights are packed as for linear.h, one expert after
// the other; gate and up are one matrix, the gate's outputs first.
//
// Between the products everything is float32, and a row's experts are added in order of rank: a
// row's bits depend on that row, its experts and their weights alone.
// Cost: 6 pairs k inner flops with a gate; bytes: the weights of the experts that have rows.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

enum class ExpertActivation : int8_t { silu, gelu, gelu_tanh, relu2 };

// Room for the pairs of one block of rows.
struct MoeScratch {
  float* rows;      // [pairs, dim], by expert: x's rows, later what their experts give
  float* inner;     // [pairs, up_outputs]: gate and up; activated, the first `inner` of them
  int32_t* starts;  // [experts + 1]: where each expert's pairs begin
  int32_t* pair;    // [pairs]: which pair lies in a place
  int32_t* place;   // [pairs]: where a pair lies; on a GPU -1 where it has no expert
  int32_t* tasks;   // [experts + 1]: of the experts before; for the CPU
  float* linear;    // for the CPU: linear_floats for each slot
  int64_t linear_floats;
};

struct MoeExperts {
  static constexpr int64_t kBlockPairs = 4096;  // at a time on the CPU: what bounds the scratch

  const void* x;         // [rows, dim]
  const int32_t* index;  // [rows, top_k], in [0, experts)
  const float* weights;  // [rows, top_k]
  const void* up;        // packed, [experts, ceil(up_outputs / 16), dim, 16]
  const void* down;      // packed, [experts, ceil(dim / 16), inner, 16]
  void* y;               // [rows, dim] in x's type
  int64_t rows, dim, inner, top_k, experts;
  int64_t x_stride, y_stride;  // elements between rows
  DType x_type, up_type, down_type;
  ExpertActivation activation;
  bool gated;
  int64_t slots;  // CPU: how many threads may work
  MoeScratch scratch;

  constexpr int64_t up_outputs() const { return gated ? 2 * inner : inner; }
};

// What is done besides the products, for some of the block's places or, in combine, rows.
enum class MoePart : int8_t { gather, activate, combine };
using MoeExpertsFn = void (*)(const MoeExperts&, MoePart, int64_t begin, int64_t end);

const Kernel<MoeExpertsFn>& moe_experts_kernel();
// Lays out a.scratch from `memory` on, 64-byte aligned or null, and gives the bytes it takes.
size_t moe_experts_scratch(MoeExperts& a, void* memory);
void moe_experts(const MoeExperts& args);

void moe_experts_scalar(const MoeExperts&, MoePart, int64_t, int64_t);
void moe_experts_avx2(const MoeExperts&, MoePart, int64_t, int64_t);
void moe_experts_avx512(const MoeExperts&, MoePart, int64_t, int64_t);
void moe_experts_neon(const MoeExperts&, MoePart, int64_t, int64_t);

int64_t moe_experts_cuda_scratch(const MoeExperts&);    // floats; they go to scratch.rows
int moe_experts_cuda(const MoeExperts&, void* stream);  // a cudaError_t

}  // namespace effinfer
