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

template <int R, int kStep, bool kOffset>
EFFINFER_INLINE void end_rows_of(const GroupEnd& g, const int32_t* sums) {
  Vec scale[kVecs];
  IVec zero[kVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) scale[v] = g.scale[v], zero[v] = g.zero[v];
  float* totals = g.totals;
  const int32_t* x_sums = g.x_sums;
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r, sums += kPanel, totals += kPanel, x_sums += g.x_groups) {
    const IVec x_sum = splat_i(*x_sums);
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      const IVec s = load_sums(sums + v * kLanes) * kStep - zero[v] * x_sum;
      Vec t = fma(scale[v], __builtin_convertvector(s, Vec), load(totals + v * kLanes));
      if (kOffset) t = fma(g.offset[v], __builtin_convertvector(x_sum, Vec), t);
      store(totals + v * kLanes, t);
    }
  }
}

// totals = fma(offset, X, fma(scale, S, totals)) of R rows, with S = kStep sums - zero X.
template <int R, int kStep>
void end_rows(const GroupEnd& g, const int32_t* sums) {
  if (g.has_offset) return end_rows_of<R, kStep, true>(g, sums);
  end_rows_of<R, kStep, false>(g, sums);
}

}  // namespace
}  // namespace effinfer
