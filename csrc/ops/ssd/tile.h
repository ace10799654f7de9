// The register tiles of the chunked scan: kTileRows x 16 sums, one operand read an element at a
// time, the other a packed panel [k][16].
#pragma once
#include "base/vec.h"
#include "ops/ssd/scratch.h"

namespace effinfer {
namespace {

constexpr int kVecs = static_cast<int>(kPanel) / kLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

typedef Vec Tile[kTileRows][kVecs];

EFFINFER_INLINE void clear(Tile& t) {
  EFFINFER_UNROLL
  for (int r = 0; r < kTileRows; ++r) EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) t[r][v] = Vec{};
}

EFFINFER_INLINE void load_tile(Tile& t, const float* from, float factor) {
  const Vec f = splat(factor);
  EFFINFER_UNROLL
  for (int r = 0; r < kTileRows; ++r) EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) t[r][v] = load(from + r * kPanel + v * kLanes) * f;
}

EFFINFER_INLINE void store_tile(const Tile& t, float* to, int64_t stride) {
  EFFINFER_UNROLL
  for (int r = 0; r < kTileRows; ++r) EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) store(to + r * stride + v * kLanes, t[r][v]);
}

// t[r] += element * panel row, for rows r >= first.
template <int kFirst = 0>
EFFINFER_INLINE void rank_one(Tile& t, const float* column, int64_t step, const float* panel) {
  Vec b[kVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) b[v] = load(panel + v * kLanes);
  EFFINFER_UNROLL
  for (int r = kFirst; r < kTileRows; ++r) {
    const Vec e = splat(column[r * step]);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) t[r][v] = fma(e, b[v], t[r][v]);
  }
}

// t += rows of a (row_stride apart, dense along k) x panel, k < terms.
EFFINFER_INLINE void multiply(Tile& t, const float* a, int64_t row_stride, const float* panel,
                              int64_t terms) {
  _Pragma("GCC unroll 2") for (int64_t k = 0; k < terms; ++k)
      rank_one(t, a + k, row_stride, panel + k * kPanel);
}

// t += transpose of a (dense along the rows, k_stride apart along k) x panel, k < terms.
EFFINFER_INLINE void multiply_transposed(Tile& t, const float* a, int64_t k_stride,
                                         const float* panel, int64_t terms) {
  _Pragma("GCC unroll 2") for (int64_t k = 0; k < terms; ++k)
      rank_one(t, a + k * k_stride, 1, panel + k * kPanel);
}

// The last terms of a lower triangular row block: row r takes columns 0..r only, so that what comes
// later, even an infinity, never touches a row.
template <int kColumn = 0>
EFFINFER_INLINE void triangle(Tile& t, const float* a, int64_t row_stride, const float* panel) {
  if constexpr (kColumn < kTileRows) {
    rank_one<kColumn>(t, a + kColumn, row_stride, panel + kColumn * kPanel);
    triangle<kColumn + 1>(t, a, row_stride, panel);
  }
}

// G = C B^T: kTileRows rows of C by 16 tokens of B.
__attribute__((noinline)) void scores_tile(const float* C, int64_t C_stride, const float* Bt,
                                           int64_t N, float* G) {
  Tile t;
  clear(t);
  multiply(t, C, C_stride, Bt, N);
  store_tile(t, G, kSsdChunk);
}

// y = pre o (C S^T) + M X for kTileRows tokens from `token` and 16 columns of P; S null for zero.
struct OutputTile {
  const float* C;
  int64_t C_stride;
  int64_t N;
  const float* pre;
  const float* M;
  const float* S = nullptr;
  const float* X = nullptr;
};
__attribute__((noinline)) void output_tile(const OutputTile& o, int64_t token, float* y,
                                           int64_t y_stride) {
  const float* const X = o.X;
  const float* const M = o.M + token * kSsdChunk;
  Tile t;
  clear(t);
  if (o.S != nullptr) {
    const float* const pre = o.pre + token;
    multiply(t, o.C + token * o.C_stride, o.C_stride, o.S, o.N);
    EFFINFER_UNROLL
    for (int r = 0; r < kTileRows; ++r) EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) t[r][v] = t[r][v] * splat(pre[r]);
  }
  multiply(t, M, kSsdChunk, X, token);
  triangle(t, M + token, kSsdChunk, X + token * kPanel);
  store_tile(t, y, y_stride);
}

// S' = factor S + B^T Xw for kTileRows rows of the packed state and 16 columns; from null for zero.
__attribute__((noinline)) void state_tile(const float* from, float factor, const float* B,
                                          int64_t B_stride, const float* Xw, int64_t tokens,
                                          float* to) {
  Tile t;
  if (from != nullptr)
    load_tile(t, from, factor);
  else
    clear(t);
  multiply_transposed(t, B, B_stride, Xw, tokens);
  store_tile(t, to, kPanel);
}

}  // namespace
}  // namespace effinfer
