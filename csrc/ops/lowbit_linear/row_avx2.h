// AVX2: one row of int8 activations, bound by the weights' bytes. Four panels advance in turns of
// two cache lines: that many streams the hardware prefetches best, at 22 GB/s where one panel after
// the other is read at 18, and software prefetches on top take it down to 20. Sums stay in
// registers up to the end of a group.
#pragma once
#include "ops/lowbit_linear/dot_avx2.h"
#include "ops/lowbit_linear/int8.h"

namespace effinfer {
namespace {

constexpr int kTurnBytes = 128;

// Where P panels of a row's task lie.
struct RowPanels {
  const LowbitWeight* weight;
  const int32_t* x_sums;  // of the row's groups
  int64_t panel;
  float* totals;  // [P, 16]
};

// totals = fma(offset, X, fma(scale, S, totals)) of panel p, as end_rows. Plain is what groups
// mostly are: f16 scales, no zeros, no offsets.
template <int kStep, int kCentre, bool kPlain>
EFFINFER_INLINE void end_group(const RowPanels& at, int p, int64_t g, const Int (&sums)[2]) {
  const LowbitWeight& w = *at.weight;
  const int32_t x_sum = at.x_sums[g];
  const int32_t lost = lowbit::layout(w.format).centre - kCentre;
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) {
    const int64_t i = (at.panel + p) * w.scale_stride + g * kPanel + v * kLanes;
    float* const total = at.totals + p * kPanel + v * kLanes;
    const bool centred = kPlain || w.zero == nullptr;
    const IVec zero =
        centred ? splat_i(kCentre * x_sum) : (load_u8(w.zero + i) - splat_i(lost)) * splat_i(x_sum);
    const Vec scale = load_as(w.scale, kPlain ? DType::f16 : w.scale_type, i);
    Vec t = fma(scale, to_float((IVec)sums[v] * kStep - zero), load(total));
    if (!kPlain && w.offset != nullptr)
      t = fma(load_as(w.offset, w.scale_type, i), to_float(splat_i(x_sum)), t);
    store(total, t);
  }
}

// sum += so many units times x.
template <class F, int kUnits>
EFFINFER_INLINE void add_units(const uint8_t* w, const int8_t* x, Int (&sum)[2]) {
  const Int ones = _mm256_set1_epi16(1);
  if constexpr (F::kSigned) {
    EFFINFER_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const Int a = load_bytes(w + u * 64), b = load_bytes(w + u * 64 + 32);
      const Int four = four_of(x + 4 * u);
      accumulate(sum[0], _mm256_abs_epi8(a), a, four, ones);
      accumulate(sum[1], _mm256_abs_epi8(b), b, four, ones);
    }
  } else {
    static_assert(kUnits * F::kUnitK / 4 <= flush_bound(F::kMaxCode));
    Int part[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    EFFINFER_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      F::quads(w + u * F::kUnitBytes, [&](int q, Int a, Int b) __attribute__((always_inline)) {
        const Int four = four_of(x + u * F::kUnitK + 4 * q);
        accumulate(part[0], a, four);
        accumulate(part[1], b, four);
      });
    }
    EFFINFER_UNROLL
    for (int v = 0; v < 2; ++v) sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(part[v], ones));
  }
}

// A row of codes, multiplied by those of a format that decodes in registers.
template <class F>
struct CodesOfRow {
  using Format = F;
  static constexpr int kPanels = 4;  // whose sums fill the registers
  const int8_t* x;

  // sums += `units` units of P panels from `unit` on, w being the first panel's.
  template <int P>
  EFFINFER_INLINE void add(const uint8_t* w, int64_t panel_stride, int64_t unit, int64_t units,
                           Int (&sums)[P][2]) const {
    constexpr int kTurn = F::kUnitBytes < kTurnBytes ? kTurnBytes / F::kUnitBytes : 1;
    const int8_t* x_at = x + unit * F::kUnitK;
    w += unit * F::kUnitBytes;
    const auto turns = [&]<int kUnits>() __attribute__((always_inline)) {
      for (; units >= kUnits; units -= kUnits) {
        EFFINFER_UNROLL
        for (int p = 0; p < P; ++p) add_units<F, kUnits>(w + p * panel_stride, x_at, sums[p]);
        w += kUnits * F::kUnitBytes;
        x_at += kUnits * F::kUnitK;
      }
    };
    turns.template operator()<kTurn>();
    if constexpr (kTurn > 1) turns.template operator()<1>();
  }
};

// Row: CodesOfRow, or what lookup_avx2.h has for formats that are looked up.
template <class Row, int P>
__attribute__((noinline)) void multiply_row(const RowPanels& at, const Row& row, int64_t k) {
  using F = typename Row::Format;
  const LowbitWeight& weight = *at.weight;
  const bool plain =
      weight.scale_type == DType::f16 && weight.zero == nullptr && weight.offset == nullptr;
  const int64_t panel_stride = weight.panel_stride, group = weight.group;
  const uint8_t* const w = weight.packed + at.panel * panel_stride;
  for (int64_t g = 0, begin = 0; begin < k; ++g, begin += group) {
    const int64_t length = k - begin < group ? k - begin : group;
    Int sums[P][2] = {};
    row.template add<P>(w, panel_stride, begin / F::kUnitK, (length + F::kUnitK - 1) / F::kUnitK,
                        sums);
    if (plain) {
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) end_group<F::kStep, F::kCentre, true>(at, p, g, sums[p]);
    } else {
      Int held[P][2];  // an index that varies would keep the sums themselves in memory
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) held[p][0] = sums[p][0], held[p][1] = sums[p][1];
      for (int p = 0; p < P; ++p) end_group<F::kStep, F::kCentre, false>(at, p, g, held[p]);
    }
  }
}

template <class Row>
void row_task(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t, const Row& row) {
  for (int64_t p = 0; p < t.panels; p += kSideBySide) {
    const int64_t width = t.panels - p < kSideBySide ? t.panels - p : kSideBySide;
    memset(t.scratch, 0, static_cast<size_t>(width * kPanel) * sizeof(float));
    RowPanels at = {&a.weight, q.sums + t.row * q.groups, t.panel + p, t.scratch};
    const int64_t stop = at.panel + width;
    const auto advance = [&](int64_t by) { at.panel += by, at.totals += by * kPanel; };
    for (; at.panel + Row::kPanels <= stop; advance(Row::kPanels))
      multiply_row<Row, Row::kPanels>(at, row, a.io.k);
    for (; at.panel < stop; advance(1)) multiply_row<Row, 1>(at, row, a.io.k);
    finish_panels(a, q.scale + t.row, t, p, width, t.scratch);
  }
}

}  // namespace
}  // namespace effinfer
