// What becomes of a group's integer sums, on every instruction set.
#pragma once
#include "base/vec.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;

constexpr int kVecs = static_cast<int>(kPanel) / kLanes;  // of a panel

// typedef, for its size depends on no template parameter
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// The end of a group for some rows: what their sums are multiplied by, and where they go.
struct GroupEnd {
  Vec scale[kVecs], offset[kVecs];
  IVec zero[kVecs];
  bool has_offset;
  const int32_t* x_sums;  // of the rows, x_groups apart
  int64_t x_groups;
  float* totals;  // [rows, 16]
};

GroupEnd load_group(const LowbitWeight& w, int64_t panel, int64_t g, int32_t centre) {
  GroupEnd out;
  const int64_t at = panel * w.scale_stride + g * kPanel;
  out.has_offset = w.offset != nullptr;
  with_type(w.scale_type, [&](auto type) {
    using T = decltype(type);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      out.scale[v] = load(static_cast<const T*>(w.scale) + at + v * kLanes);
      if (out.has_offset) out.offset[v] = load(static_cast<const T*>(w.offset) + at + v * kLanes);
    }
  });
  const int32_t lost = lowbit::layout(w.format).centre - centre;  // by values and zeros alike
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    out.zero[v] = splat_i(centre);
    if (w.zero == nullptr) continue;
    const Bytes codes = *reinterpret_cast<const Bytes*>(w.zero + at + v * kLanes);
    out.zero[v] = __builtin_convertvector(codes, IVec) - splat_i(lost);
  }
  return out;
}

EFFINFER_INLINE IVec load_sums(const int32_t* p) {
  IVec out;
  memcpy(&out, p, sizeof(out));
  return out;
}
EFFINFER_INLINE void store_sums(int32_t* p, IVec x) { memcpy(p, &x, sizeof(x)); }

// totals = fma(offset, X, fma(scale, S, totals)) of R rows, with S = kStep sums - zero X.
template <int R, int kStep, bool kOffset>
EFFINFER_INLINE void end_rows(const GroupEnd& g, const IVec (&sums)[R][kVecs]) {
  float* totals = g.totals;
  const int32_t* x_sums = g.x_sums;
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r, totals += kPanel, x_sums += g.x_groups) {
    const IVec x_sum = splat_i(*x_sums);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const IVec s = sums[r][v] * kStep - g.zero[v] * x_sum;
      Vec t = fma(g.scale[v], __builtin_convertvector(s, Vec), load(totals + v * kLanes));
      if (kOffset) t = fma(g.offset[v], __builtin_convertvector(x_sum, Vec), t);
      store(totals + v * kLanes, t);
    }
  }
}

template <int R, int kStep>
EFFINFER_INLINE void end_rows(const GroupEnd& g, const IVec (&sums)[R][kVecs]) {
  if (g.has_offset)
    end_rows<R, kStep, true>(g, sums);
  else
    end_rows<R, kStep, false>(g, sums);
}

// Where a block's integer sums of some rows go: on to the group's next block, or to its end.
struct Sink {
  int32_t* sums;  // [rows, 16] of the group's blocks before
  bool first;     // there are none before
  GroupEnd* end;  // null where blocks follow
  int64_t run_k;  // of so many k at a time, sums of products fit 16 bits; 0 for unknown

  template <int R, int kStep>
  EFFINFER_INLINE void take(IVec (&block)[R][kVecs]) const {
    if (!first) {
      EFFINFER_UNROLL
      for (int i = 0; i < R * kVecs; ++i)
        block[i / kVecs][i % kVecs] += load_sums(sums + i * kLanes);
    }
    if (end != nullptr) return end_rows<R, kStep>(*end, block);
    EFFINFER_UNROLL
    for (int i = 0; i < R * kVecs; ++i) store_sums(sums + i * kLanes, block[i / kVecs][i % kVecs]);
  }
};

}  // namespace
}  // namespace effinfer
