// Counting on x86 with byte shuffles. popcount(x ^ w) of four k is one of 16 values for a given
// four bits of x, so the shuffle that looks them up takes four bits of 32 outputs' weights as its
// indices: three instructions for 128 products, all but the load on 32 outputs at once.
#pragma once
#include "base/vec.h"
#include "ops/binary_linear/bits.h"

namespace effinfer {
namespace {

using namespace binary_layout;

struct Popcounts {
  alignas(64) uint8_t of[256][32];
};

// For each byte of x: the popcounts against every low half of a byte of weights, then high half.
constexpr Popcounts make_popcounts() {
  Popcounts table = {};
  for (unsigned x = 0; x < 256; ++x)
    for (unsigned w = 0; w < 16; ++w) {
      table.of[x][w] = static_cast<uint8_t>(__builtin_popcount((x & 15) ^ w));
      table.of[x][16 + w] = static_cast<uint8_t>(__builtin_popcount((x >> 4) ^ w));
    }
  return table;
}
constexpr Popcounts kPopcounts = make_popcounts();

#if defined(__AVX512BW__)
using Bytes = __m512i;
constexpr int kBytesPanels = 2;  // in one register
EFFINFER_INLINE Bytes load_outputs(const uint8_t* w, int64_t panel_stride) {
  const auto at = [&](int64_t i) { return reinterpret_cast<const __m256i*>(w + i * panel_stride); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(at(0))),
                            _mm256_loadu_si256(at(1)), 1);
}
EFFINFER_INLINE Bytes lookup_table(const uint8_t* t) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}
EFFINFER_INLINE Bytes lookup(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
EFFINFER_INLINE Bytes low_half(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
EFFINFER_INLINE Bytes high_half(Bytes w) { return low_half(_mm512_srli_epi16(w, 4)); }
EFFINFER_INLINE void accumulate(Bytes& sum, Bytes x) {
  asm("vpaddb %1, %0, %0" : "+v"(sum) : "v"(x));
}
#else
using Bytes = __m256i;
constexpr int kBytesPanels = 1;
EFFINFER_INLINE Bytes load_outputs(const uint8_t* w, int64_t) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
}
EFFINFER_INLINE Bytes lookup_table(const uint8_t* t) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
}
EFFINFER_INLINE Bytes lookup(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
EFFINFER_INLINE Bytes low_half(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
EFFINFER_INLINE Bytes high_half(Bytes w) { return low_half(_mm256_srli_epi16(w, 4)); }
// gcc 12 left to itself moves the sums between registers: as asm they stay where they are.
EFFINFER_INLINE void accumulate(Bytes& sum, Bytes x) {
  asm("vpaddb %1, %0, %0" : "+x"(sum) : "x"(x));
}
#endif

// counts[0..16) += the 16 bytes.
EFFINFER_INLINE void add_bytes(__m128i bytes, int32_t* counts) {
  float* const at = reinterpret_cast<float*>(counts);
#if defined(__AVX512BW__)
  store(at, from_bits(bits_of(load(at)) + (IVec)_mm512_cvtepu8_epi32(bytes)));
#else
  const auto low = (IVec)_mm256_cvtepu8_epi32(bytes);
  const auto high = (IVec)_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes));
  store(at, from_bits(bits_of(load(at)) + low));
  store(at + 8, from_bits(bits_of(load(at + 8)) + high));
#endif
}

// Adds the bytes of `sum` to 32-bit counts: 16 of them every `part` elements.
EFFINFER_INLINE void flush(Bytes sum, int32_t* counts, int64_t part) {
#if defined(__AVX512BW__)
  add_bytes(_mm512_extracti32x4_epi32(sum, 0), counts);
  add_bytes(_mm512_extracti32x4_epi32(sum, 1), counts + part);
  add_bytes(_mm512_extracti32x4_epi32(sum, 2), counts + 2 * part);
  add_bytes(_mm512_extracti32x4_epi32(sum, 3), counts + 3 * part);
#else
  add_bytes(_mm256_castsi256_si128(sum), counts);
  add_bytes(_mm256_extracti128_si256(sum, 1), counts + part);
#endif
}

constexpr int64_t kAhead = 1024;  // bytes of a panel's stream that are fetched early

// R rows of x against V registers of outputs.
template <int R, int V>
void count_tile(const CountTask& t, int64_t row, int64_t panel) {
  const int64_t x_stride = t.x_stride, bytes = t.bytes, part = t.rows * kPart;
  const int64_t panel_stride = t.panel_stride;
  // A register's second panel may be one too many: then the first is counted twice.
  const int64_t second = panel + V * kBytesPanels <= t.panels ? panel_stride : 0;
  const uint8_t* w = t.weight + panel * panel_stride;
  const uint8_t* x = t.x + row * x_stride;
  int32_t* const counts = t.counts + 2 * panel * part + row * kPart;
  EFFINFER_UNROLL
  for (int p = 0; p < 2 * V * kBytesPanels; ++p) {
    for (int64_t i = 0; i < R * kPart; ++i) counts[p * part + i] = 0;
  }
  for (int64_t begin = 0; begin < bytes; begin += kFlush) {
    Bytes sum[R][V] = {};
    const uint8_t* const end = x + (bytes - begin < kFlush ? bytes - begin : kFlush);
    for (; x < end; ++x, w += kOutputs) {
      Bytes low[V], high[V];
      EFFINFER_UNROLL
      for (int v = 0; v < V; ++v) {
        const uint8_t* const at = w + v * kBytesPanels * panel_stride;
        if constexpr (R <= 2) __builtin_prefetch(at + kAhead);
        const Bytes both = load_outputs(at, second);
        low[v] = low_half(both);
        high[v] = high_half(both);
      }
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8_t* const table = kPopcounts.of[x[r * x_stride]];
        const Bytes low_table = lookup_table(table);
        EFFINFER_UNROLL
        for (int v = 0; v < V; ++v) accumulate(sum[r][v], lookup(low_table, low[v]));
        const Bytes high_table = lookup_table(table + 16);
        EFFINFER_UNROLL
        for (int v = 0; v < V; ++v) accumulate(sum[r][v], lookup(high_table, high[v]));
      }
    }
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFINFER_UNROLL
      for (int v = 0; v < V; ++v)
        flush(sum[r][v], counts + 2 * v * kBytesPanels * part + r * kPart, part);
    }
  }
}

// Every row against V registers of outputs, R rows at a time and the rest together.
template <int R, int V>
void count_rows(const CountTask& t, int64_t row, int64_t panel) {
  for (; t.rows - row >= R; row += R) count_tile<R, V>(t, row, panel);
  if constexpr (R > 1) {
    if (row < t.rows) count_rows<R - 1, V>(t, row, panel);
  }
}

// The largest tile whose sums stay in registers; one or two rows, which wait for memory, walk down
// the whole group at once.
#if defined(__AVX512BW__)
constexpr int kTileRows = 8, kTileWidth = 2, kNarrowWidth = 2;
#else
constexpr int kTileRows = 4, kTileWidth = 2, kNarrowWidth = 4;
#endif

EFFINFER_INLINE void count_group(const CountTask& t) {
  constexpr int kNarrow = kNarrowWidth * kBytesPanels, kWide = kTileWidth * kBytesPanels;
  int64_t panel = 0;
  if (t.rows <= 2) {
    for (; t.panels - panel >= kNarrow; panel += kNarrow) count_rows<2, kNarrowWidth>(t, 0, panel);
  } else {
    for (; t.panels - panel >= kWide; panel += kWide)
      count_rows<kTileRows, kTileWidth>(t, 0, panel);
  }
  for (; panel < t.panels; panel += kBytesPanels) count_rows<kTileRows, 1>(t, 0, panel);
}

}  // namespace
}  // namespace effinfer
