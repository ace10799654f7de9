// AVX2: one to four rows of int8 activations times codes of under two bits, by table lookup instead
// of products (the tables of T-MAC, 2407.00088, and of bitnet.cpp's TL2, 2410.16144; exact in 16
// bits here). For `width` consecutive activations a table holds the sums that the 16 values of a
// packed nibble stand for, low bytes apart from high bytes, so two byte shuffles look 32 nibbles
// up.
//
// 16 bytes of a unit are 16 outputs, and the two halves of a register are two such rows of
// different k, each with a table of its own; a block's halves are added at its end.
#pragma once
#include "ops/lowbit_linear/row_avx2.h"

namespace effinfer {
namespace {

constexpr int64_t kStepBytes = 64;      // of the two tables one lookup of 32 nibbles reads
constexpr int64_t kLookupAhead = 1024;  // bytes of packed weights

EFFINFER_INLINE Int nibbles(Int pairs, bool high) {
  return (high ? shift_right<4>(pairs) : pairs) & bytes(15);
}

// What a block of lookups reads and adds to.
struct LookupBlock {
  const uint8_t* packed;  // of the first panel
  int64_t panel_stride;
  const uint8_t* tables;  // of the first row
  int64_t table_stride;   // bytes between rows
  int64_t units;
  int32_t* sums;       // [panels, rows, 16]
  int64_t panel_sums;  // elements between panels of sums
};

// Codes 0 and 1, 32 k a unit: a nibble is four codes, and its sum is that of the activations under
// its ones.
struct BinaryLookup {
  static constexpr int kUnitK = 32, kUnitBytes = 64, kUnitSteps = 4;
  static constexpr int64_t kTableBytes = kUnitSteps * kStepBytes;  // of a unit
  static constexpr int kStep = 2, kCentre = 1;
  static constexpr int kWidth = 4;  // activations of one table
  static constexpr int kLive = 4;   // rows times panels whose sums fill the registers

  // The 16 sums of four activations.
  EFFINFER_INLINE static Int table(const int8_t* x) {
    const Int number = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Int sum = _mm256_setzero_si256();
    EFFINFER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Int bit = _mm256_set1_epi16(static_cast<int16_t>(1 << i));
      const Int has = _mm256_cmpeq_epi16(_mm256_and_si256(number, bit), bit);
      sum = _mm256_add_epi16(sum, _mm256_and_si256(has, _mm256_set1_epi16(x[i])));
    }
    return sum;
  }
  // Where in a unit of x the tables of a step begin: for the lower and the upper half.
  static constexpr int first(int step, int half) { return step / 2 * 16 + half * 8 + step % 2 * 4; }
};

// Three values of -1, 0, 1 as a magnitude of 0 to 13 in a nibble and a sign: 48 k a unit. Its sums
// are in two digits of base 31, so small that a unit's add up in bytes before they are widened.
struct DenseLookup {
  static constexpr int kUnitK = 48, kUnitBytes = 160, kUnitSteps = 8;
  static constexpr int64_t kTableBytes = kUnitSteps * kStepBytes;
  static constexpr int kStep = 1, kCentre = 0;
  static constexpr int kWidth = 3;
  static constexpr int kLive = 2;
  static constexpr int kBase = 31;  // odd: the digits and their negatives are the same

  // T = low + 31 high with |low| <= 15, the bytes of 16-bit lanes.
  EFFINFER_INLINE static Int digits(Int t) {
    const Int high = _mm256_mulhrs_epi16(t, _mm256_set1_epi16((1 << 15) / kBase));  // rounds
    const Int low = _mm256_sub_epi16(t, _mm256_mullo_epi16(high, _mm256_set1_epi16(kBase)));
    return _mm256_or_si256(_mm256_slli_epi16(high, 8),
                           _mm256_and_si256(low, _mm256_set1_epi16(255)));
  }

  EFFINFER_INLINE static Int table(const int8_t* x) {
    // The digits of 0 to 13 in balanced base 3; 14 and 15 are no magnitudes.
    const Int a = _mm256_setr_epi16(0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0);
    const Int b = _mm256_setr_epi16(0, 0, 1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1, 0, 0);
    const Int c = _mm256_setr_epi16(0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, 0, 0);
    const Int ab = _mm256_add_epi16(_mm256_sign_epi16(_mm256_set1_epi16(x[0]), a),
                                    _mm256_sign_epi16(_mm256_set1_epi16(x[1]), b));
    return digits(_mm256_add_epi16(ab, _mm256_sign_epi16(_mm256_set1_epi16(x[2]), c)));
  }
  static constexpr int first(int step, int half) {
    return 3 * (step / 2 * 4 + half * 2 + step % 2);
  }
};

// Steps of a block: its sums, of both halves together, fit 16 bits.
template <class L>
constexpr int kBlockSteps = static_cast<int>(lowbit::kBlock) / L::kUnitK * L::kUnitSteps;
static_assert(2 * kBlockSteps<BinaryLookup> * BinaryLookup::kWidth * kLargestX <= 32767);
static_assert(2 * kBlockSteps<DenseLookup> * DenseLookup::kWidth * kLargestX <= 32767);
// A unit's digits fit bytes.
static_assert(DenseLookup::kUnitSteps * (DenseLookup::kBase / 2) <= 127);
static_assert(DenseLookup::kUnitSteps *
                  (DenseLookup::kWidth * kLargestX / DenseLookup::kBase + 1) <=
              127);

// sum += pairs of bytes, in place: gcc 12 else gathers a unit's addends in memory to add them as a
// tree.
EFFINFER_INLINE void accumulate_16(Int& sum, Int part) {
  sum = _mm256_add_epi16(sum, part);
  asm("" : "+x"(sum));
}

// The tables of so many rows, from `row` on.
template <class L>
void make_tables(const LowbitRows& q, int64_t row, int64_t rows) {
  // Low bytes of 16-bit lanes to the lower half of each 128 bits, high bytes to the upper.
  const Int split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  for (int64_t r = row; r < row + rows; ++r) {
    const int8_t* x = q.codes + r * q.stride;
    uint8_t* out = q.tables + r * q.table_stride;
    for (int64_t units = q.table_stride / L::kTableBytes; units > 0; --units, x += L::kUnitK) {
      for (int step = 0; step < L::kUnitSteps; ++step, out += kStepBytes) {
        for (int half = 0; half < 2; ++half) {
          const Int sums = _mm256_shuffle_epi8(L::table(x + L::first(step, half)), split);
          const Int both = _mm256_permute4x64_epi64(sums, 0xd8);
          auto* const at = reinterpret_cast<__m128i*>(out) + half;
          _mm_storeu_si128(at, _mm256_castsi256_si128(both));
          _mm_storeu_si128(at + 2, _mm256_extracti128_si256(both, 1));
        }
      }
    }
  }
}

// 16-bit sums of two halves, added up and widened.
EFFINFER_INLINE Int add_halves(Int x) {
  return _mm256_cvtepi16_epi32(
      _mm_add_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}

// Adds a block's sums: outputs 0 to 7 to `first`, 8 to 15 to `second`.
template <int R, int P>
EFFINFER_INLINE void add_lookups(const LookupBlock& b, Int (&first)[R][P], Int (&second)[R][P],
                                 BinaryLookup) {
  using L = BinaryLookup;
  const int64_t panel_stride = b.panel_stride, table_stride = b.table_stride;
  const uint8_t* packed = b.packed;
  const uint8_t* tables = b.tables;
  for (int64_t units = b.units; units > 0; --units, packed += L::kUnitBytes) {
    EFFINFER_UNROLL
    for (int step = 0; step < L::kUnitSteps; ++step) {
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const Int low = load_bytes(tables + r * table_stride);
        const Int high = load_bytes(tables + r * table_stride + 32);
        EFFINFER_UNROLL
        for (int p = 0; p < P; ++p) {
          const Int at =
              nibbles(load_bytes(packed + p * panel_stride + step / 2 * 32), step % 2 != 0);
          const Int l = _mm256_shuffle_epi8(low, at), h = _mm256_shuffle_epi8(high, at);
          accumulate_16(first[r][p], _mm256_unpacklo_epi8(l, h));
          accumulate_16(second[r][p], _mm256_unpackhi_epi8(l, h));
        }
      }
      tables += kStepBytes;
    }
  }
}

// sum += bytes, in place as above.
EFFINFER_INLINE void accumulate_8(Int& sum, Int part) {
  sum = _mm256_add_epi8(sum, part);
  asm("" : "+x"(sum));
}

template <int R, int P>
EFFINFER_INLINE void add_lookups(const LookupBlock& b, Int (&first)[R][P], Int (&second)[R][P],
                                 DenseLookup) {
  using L = DenseLookup;
  const int64_t panel_stride = b.panel_stride, table_stride = b.table_stride;
  const uint8_t* packed = b.packed;
  const uint8_t* tables = b.tables;
  // Signs of triples 0 to 7 of 16 outputs, then of 8 to 15, from words.
  const Int split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const Int place_values = _mm256_set1_epi16(L::kBase << 8 | 1), one = bytes(1);
  for (int64_t units = b.units; units > 0; --units, packed += L::kUnitBytes) {
    Int signs[P][2], low[R][P], high[R][P];
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) {
      const uint8_t* const unit = packed + p * panel_stride;
      __builtin_prefetch(unit + kLookupAhead);
      __builtin_prefetch(unit + kLookupAhead + 64);
      __builtin_prefetch(unit + kLookupAhead + 128);
      const Int both = _mm256_shuffle_epi8(load_bytes(unit + 128), split);
      signs[p][0] = _mm256_permute4x64_epi64(both, 0x88);
      signs[p][1] = _mm256_permute4x64_epi64(both, 0xdd);
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) low[r][p] = high[r][p] = _mm256_setzero_si256();
    }
    EFFINFER_UNROLL
    for (int step = 0; step < L::kUnitSteps; ++step) {
      const int bit = step / 2 % 2 * 4 + step % 2;  // in the lower half; two more in the upper
      const Int to_top =
          _mm256_setr_epi32(7 - bit, 7 - bit, 7 - bit, 7 - bit, 5 - bit, 5 - bit, 5 - bit, 5 - bit);
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) {
        const Int at =
            nibbles(load_bytes(packed + p * panel_stride + step / 2 * 32), step % 2 != 0);
        // Negative where the sign is, and nowhere zero.
        const Int sign = _mm256_or_si256(_mm256_sllv_epi32(signs[p][step / 4], to_top), one);
        EFFINFER_UNROLL
        for (int r = 0; r < R; ++r) {
          const uint8_t* const table = tables + r * table_stride;
          const Int l = _mm256_shuffle_epi8(load_bytes(table), at);
          const Int h = _mm256_shuffle_epi8(load_bytes(table + 32), at);
          accumulate_8(low[r][p], _mm256_sign_epi8(l, sign));
          accumulate_8(high[r][p], _mm256_sign_epi8(h, sign));
        }
      }
      tables += kStepBytes;
    }
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) {
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const Int l = low[r][p], h = high[r][p];
        accumulate_16(first[r][p], _mm256_maddubs_epi16(place_values, _mm256_unpacklo_epi8(l, h)));
        accumulate_16(second[r][p], _mm256_maddubs_epi16(place_values, _mm256_unpackhi_epi8(l, h)));
      }
    }
  }
}

template <class L, int R, int P>
__attribute__((noinline)) void look_up(const LookupBlock& b) {
  Int first[R][P] = {}, second[R][P] = {};
  add_lookups<R, P>(b, first, second, L{});
  EFFINFER_UNROLL
  for (int p = 0; p < P; ++p) {
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      auto* const at = reinterpret_cast<Int*>(b.sums + p * b.panel_sums + r * kPanel);
      _mm256_storeu_si256(at, _mm256_add_epi32(load_bytes(at), add_halves(first[r][p])));
      _mm256_storeu_si256(at + 1, _mm256_add_epi32(load_bytes(at + 1), add_halves(second[r][p])));
    }
  }
}

// The tables of one row, for multiply_row.
template <class L>
struct TablesOfRow {
  using Format = L;
  static constexpr int kPanels = L::kLive;
  const uint8_t* tables;

  template <int P>
  EFFINFER_INLINE void add(const uint8_t* w, int64_t panel_stride, int64_t unit, int64_t units,
                           Int (&sums)[P][2]) const {
    constexpr int64_t kMost = kBlockSteps<L> / L::kUnitSteps;
    for (; units > 0; unit += kMost, units -= kMost) {
      const LookupBlock block = {w + unit * L::kUnitBytes,
                                 panel_stride,
                                 tables + unit * L::kTableBytes,
                                 0,
                                 units < kMost ? units : kMost,
                                 nullptr,
                                 0};
      Int first[1][P] = {}, second[1][P] = {};
      add_lookups<1, P>(block, first, second, L{});
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) {
        sums[p][0] = _mm256_add_epi32(sums[p][0], add_halves(first[0][p]));
        sums[p][1] = _mm256_add_epi32(sums[p][1], add_halves(second[0][p]));
      }
    }
  }
};

// R rows times all panels.
template <class L, int R>
EFFINFER_INLINE void look_up_rows(LookupBlock b, int64_t panels) {
  constexpr int kPanels = L::kLive / R;
  const auto advance = [&](int64_t by) {
    b.packed += by * b.panel_stride;
    b.sums += by * b.panel_sums;
    panels -= by;
  };
  for (; panels >= kPanels; advance(kPanels)) look_up<L, R, kPanels>(b);
  if constexpr (kPanels > 1) {
    for (; panels > 0; advance(1)) look_up<L, R, 1>(b);
  }
}

template <class L, int R = L::kLive>
EFFINFER_INLINE void look_up_at_most(const LookupBlock& b, int64_t rows, int64_t panels) {
  if constexpr (R > 1) {
    if (rows < R) return look_up_at_most<L, R - 1>(b, rows, panels);
  }
  look_up_rows<L, R>(b, panels);
}

template <class L>
void look_up_panels(LookupBlock b, int64_t rows, int64_t panels) {
  for (; rows > 0; rows -= L::kLive) {
    look_up_at_most<L>(b, rows < L::kLive ? rows : L::kLive, panels);
    b.tables += L::kLive * b.table_stride;
    b.sums += L::kLive * kPanel;
  }
}

// One task; as int8_task, but a block of all panels side by side reads its tables once.
template <class L>
void lookup_task(const LowbitLinear& a, const LowbitRows& q, const LinearTask& t) {
  if (t.rows == 1) return row_task(a, q, t, TablesOfRow<L>{q.tables + t.row * q.table_stride});
  constexpr int64_t kLongest = kBlock / L::kUnitK * L::kUnitK;
  const LowbitWeight& w = a.weight;
  const int64_t k = a.io.k, rows = t.rows, part = rows * kPanel;
  float* const totals = t.scratch;
  auto* const sums = reinterpret_cast<int32_t*>(totals + kSideBySide * part);
  for (int64_t p = 0; p < t.panels; p += kSideBySide) {
    const int64_t width = t.panels - p < kSideBySide ? t.panels - p : kSideBySide;
    memset(totals, 0, static_cast<size_t>(width * part) * sizeof(float));
    for (int64_t g = 0, begin = 0; begin < k;) {
      const int64_t group_end = (g + 1) * w.group < k ? (g + 1) * w.group : k;
      const int64_t end = begin + kLongest < group_end ? begin + kLongest : group_end;
      if (begin == g * w.group) memset(sums, 0, static_cast<size_t>(width * part) * sizeof(*sums));
      const int64_t unit = begin / L::kUnitK;
      const LookupBlock block = {w.packed + (t.panel + p) * w.panel_stride + unit * L::kUnitBytes,
                                 w.panel_stride,
                                 q.tables + t.row * q.table_stride + unit * L::kTableBytes,
                                 q.table_stride,
                                 (end - begin + L::kUnitK - 1) / L::kUnitK,
                                 sums,
                                 part};
      look_up_panels<L>(block, rows, width);
      begin = end;
      if (end < group_end) continue;
      for (int64_t i = 0; i < width; ++i) {
        GroupEnd group = load_group(w, t.panel + p + i, g, L::kCentre);
        group.x_sums = q.sums + t.row * q.groups + g;
        group.totals = totals + i * part;
        for (int64_t r = 0; r < rows; ++r, group.x_sums += q.groups, group.totals += kPanel) {
          IVec none[1][kVecs] = {};
          Sink{sums + i * part + r * kPanel, false, &group, 0}.take<1, L::kStep>(none);
        }
      }
      ++g;
    }
    finish_panels(a, q.scale + t.row, t, p, width, totals);
  }
}

}  // namespace
}  // namespace effinfer
