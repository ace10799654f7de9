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

// counts[0..16) += the 16 bytes, or = where they are the first.
template <bool kFirst>
EFFINFER_INLINE void add_bytes(__m128i bytes, int32_t* counts) {
  float* const at = reinterpret_cast<float*>(counts);
  const auto put = [&](int64_t i, IVec sums) __attribute__((always_inline)) {
    store(at + i, from_bits(kFirst ? sums : sums + bits_of(load(at + i))));
  };
#if defined(__AVX512BW__)
  put(0, (IVec)_mm512_cvtepu8_epi32(bytes));
#else
  put(0, (IVec)_mm256_cvtepu8_epi32(bytes));
  put(8, (IVec)_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
#endif
}

// Adds the bytes of `sum` to 32-bit counts: 16 of them every `part` elements.
template <bool kFirst>
EFFINFER_INLINE void flush(Bytes sum, int32_t* counts, int64_t part) {
#if defined(__AVX512BW__)
  add_bytes<kFirst>(_mm512_extracti32x4_epi32(sum, 0), counts);
  add_bytes<kFirst>(_mm512_extracti32x4_epi32(sum, 1), counts + part);
  add_bytes<kFirst>(_mm512_extracti32x4_epi32(sum, 2), counts + 2 * part);
  add_bytes<kFirst>(_mm512_extracti32x4_epi32(sum, 3), counts + 3 * part);
#else
  add_bytes<kFirst>(_mm256_castsi256_si128(sum), counts);
  add_bytes<kFirst>(_mm256_extracti128_si256(sum, 1), counts + part);
#endif
}

constexpr int64_t kAhead = 1024;  // bytes of a panel's stream that are fetched early

// f(0), f(1), ... f(N - 1) with constants: arrays of registers that only constants index stay in
// registers, where gcc 12 keeps those of unrolled loops in memory.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int N, class F>
EFFINFER_INLINE void each(const F& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(Index<N - 1>{});
  }
}

// At most kFlush bytes of k: R rows of x against V registers of outputs.
template <int R, int V, bool kFirst>
EFFINFER_INLINE void count_block(const uint8_t* x, int64_t x_stride, const uint8_t* w,
                                 int64_t panel_stride, int64_t second, int64_t bytes,
                                 int32_t* counts, int64_t part) {
  Bytes sum[R * V];
  each<R * V>([&](auto i) __attribute__((always_inline)) { sum[i] = Bytes{}; });
  for (int64_t i = 0; i < bytes; ++i, w += kOutputs) {
    const uint8_t* table[R];
    Bytes half[V];
    each<V>([&](auto v) __attribute__((always_inline)) {
      const uint8_t* const at = w + v * kBytesPanels * panel_stride;
      if constexpr (R <= 2) __builtin_prefetch(at + kAhead);
      half[v] = low_half(load_outputs(at, second));
    });
    each<R>([&](auto r) __attribute__((always_inline)) {
      table[r] = kPopcounts.of[x[r * x_stride + i]];
      const Bytes found = lookup_table(table[r]);
      each<V>([&](auto v) __attribute__((always_inline)) {
        accumulate(sum[r * V + v], lookup(found, half[v]));
      });
    });
    each<V>([&](auto v) __attribute__((always_inline)) {
      half[v] = high_half(load_outputs(w + v * kBytesPanels * panel_stride, second));
    });
    each<R>([&](auto r) __attribute__((always_inline)) {
      const Bytes found = lookup_table(table[r] + 16);
      each<V>([&](auto v) __attribute__((always_inline)) {
        accumulate(sum[r * V + v], lookup(found, half[v]));
      });
    });
  }
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<V>([&](auto v) __attribute__((always_inline)) {
      flush<kFirst>(sum[r * V + v], counts + 2 * v * kBytesPanels * part + r * kPart, part);
    });
  });
}

template <int R, int V>
void count_tile(const CountTask& t, int64_t row, int64_t panel) {
  const int64_t x_stride = t.x_stride, part = t.rows * kPart, panel_stride = t.panel_stride;
  // A register's second panel may be one too many: then the first is counted twice.
  const int64_t second = panel + V * kBytesPanels <= t.panels ? panel_stride : 0;
  const uint8_t* w = t.weight + panel * panel_stride;
  const uint8_t* x = t.x + row * x_stride;
  int32_t* const counts = t.counts + 2 * panel * part + row * kPart;
  int64_t left = t.bytes, now = left < kFlush ? left : kFlush;
  count_block<R, V, true>(x, x_stride, w, panel_stride, second, now, counts, part);
  for (left -= now; left > 0; left -= now) {
    x += now;
    w += now * kOutputs;
    now = left < kFlush ? left : kFlush;
    count_block<R, V, false>(x, x_stride, w, panel_stride, second, now, counts, part);
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
