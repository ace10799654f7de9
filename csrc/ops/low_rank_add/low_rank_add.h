// What every row's own low-rank matrices add to a product (multi-adapter products in one launch:
// Punica, arXiv 2310.18547).
//
//   y[i] += up[g] (down[g] x[i]) + bias[g],  g = index[i]
//
// y's columns are those of up to kMaxParts linears of the same x side by side, each with a rank of
// its own. down holds their rows one part after the other; up, per part, panels of 16 outputs,
// [ceil(outputs / 16), rank, 16], outputs past the part's last are zero. Rows of one group that lie
// together share its reading.
//
// A row's low-rank products are float32, whatever the types, and every sum has one order per
// instruction set: a row's bits depend on that row and its group's matrices alone.
// Cost: 2 rows (k rank + sum of outputs x rank) flops; bytes: the matrices of the groups present
// once for every four rows, from cache after the first.
#pragma once
#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

struct LowRankAdd {
  static constexpr int kMaxParts = 4;
  static constexpr int64_t kPanel = 16;
  struct Part {
    int64_t outputs, rank;
    constexpr int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  };

  const void* x;         // [rows, k]
  const int32_t* index;  // [rows], in [0, groups)
  const void* down;      // [groups, rank, k]
  const void* up;        // [groups, up_size]
  const float* bias;     // [groups, n], or null
  void* y;               // [rows, n] in x's type
  float* low;            // [rows, rank]; for the CPU
  Part parts[kMaxParts];
  int part_count;
  int64_t rows, k, n, rank, up_size;  // n, rank: of all parts
  int64_t x_stride, y_stride;         // elements between rows
  DType x_type, weight_type;

  int64_t panels() const {
    int64_t all = 0;
    for (int p = 0; p < part_count; ++p) all += parts[p].panels();
    return all;
  }
};

// Rows [begin, end).
using LowRankAddFn = void (*)(const LowRankAdd&, int64_t begin, int64_t end);

const Kernel<LowRankAddFn>& low_rank_add_kernel();
void low_rank_add(const LowRankAdd& args);

void low_rank_add_scalar(const LowRankAdd&, int64_t, int64_t);
void low_rank_add_avx2(const LowRankAdd&, int64_t, int64_t);
void low_rank_add_avx512(const LowRankAdd&, int64_t, int64_t);
void low_rank_add_neon(const LowRankAdd&, int64_t, int64_t);

int low_rank_add_cuda(const LowRankAdd&, void* stream);  // a cudaError_t

}  // namespace effinfer
