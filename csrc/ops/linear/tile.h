// The micro-kernel: R rows of x times P panels of 16 outputs over at most kTerms products, all sums
// in registers. Included by generic.h only.
#pragma once
#include "base/vec.h"
#include "ops/linear/linear.h"

namespace effinfer {
namespace {

using namespace linear_layout;

constexpr int64_t kLine = 64;
constexpr int kPanelVecs = static_cast<int>(kPanel) / kLanes;

// The largest tile: its sums, one row of weights and one element of x fill the registers.
#if defined(__AVX512F__)
constexpr int kTileHeight = 12, kTilePanels = 2, kUnroll = 2;
#else
constexpr int kTileHeight = 6, kTilePanels = 1, kUnroll = 4;
#endif

// How often a tile prefetches a line of what comes next: every so many terms, or not at all. In
// turns: often, from each of kMaxGroup panels in a round of terms.
constexpr int kNever = 0, kInTurns = 1, kOften = 2, kSeldom = kUnroll;
constexpr int64_t kRound = kOften * kMaxGroup;

// Whether so many rows, two tiles, take kMaxGroup panels at a time. Fewer are strips (strips.h);
// more compute for longer than they wait, whatever the order.
template <class W>
constexpr bool in_turns(int64_t rows) {
  return sizeof(W) == sizeof(float) && kTilePanels == 1 && rows > kTileHeight &&
         rows <= 2 * kTileHeight;
}

#if defined(__aarch64__)
using Element = float;  // fmla takes it from lane 0: spreading it would cost a vector pipe
EFFINFER_INLINE Element element(float x) { return x; }
#else
using Element = Vec;
EFFINFER_INLINE Element element(float x) { return splat(x); }
#endif

// sum += a * b, in place. Left to itself gcc 12 renames the sums from one product to the next (the
// 132 form) and moves them back at the loop's end, and reads b from memory once per row: 8 % of the
// 6-row tile's speed, 20 % of the 5-row tile's. clang needs no help; Arm has the in-place form
// only.
EFFINFER_INLINE void accumulate(Vec& sum, Element a, Vec b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__AVX2__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#elif defined(__aarch64__)
  asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(sum) : "w"(b), "w"(a));
#else
  sum = fma(a, b, sum);
#endif
}

EFFINFER_INLINE void load_panel(const float* w, Vec* out) {
  EFFINFER_UNROLL
  for (int v = 0; v < kPanelVecs; ++v) out[v] = load(w + v * kLanes);
}

EFFINFER_INLINE void load_panel(const f16* w, Vec* out) {
  EFFINFER_UNROLL
  for (int v = 0; v < kPanelVecs; ++v) out[v] = load(w + v * kLanes);
}

EFFINFER_INLINE void load_panel(const bf16* w, Vec* out) {
#if defined(__AVX512F__)
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i low = _mm256_slli_epi32(pairs, 16);
  const __m256i high = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  out[0] = (Vec)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#else
  constexpr int kHalf = kPanelVecs / 2;
  EFFINFER_UNROLL
  for (int v = 0; v < kHalf; ++v) {
    const IVec pairs = bits_of(load(reinterpret_cast<const float*>(w + 2 * v * kLanes)));
    out[v] = from_bits(pairs << 16);
    out[kHalf + v] = from_bits(pairs & splat_i(static_cast<int32_t>(0xffff0000u)));
  }
#endif
}

// Where sums lie: rows and panels so many floats apart.
struct Place {
  float* at;
  int64_t row, panel;
};

// What a tile reads and writes besides its size.
template <class W>
struct TileArgs {
  int64_t terms;         // <= kTerms
  const W* w;            // the first panel's first row for these terms
  int64_t panel_stride;  // elements between panels
  const float* x;        // rows kXStride apart
  Place before, after;   // after = before + the sums; from zero where before is null
  const char* ahead;     // weights to prefetch, per panel
};

// No branch on kPrefetch inside the loop: that alone costs 2 %, and so does prefetching what is
// there already.
template <int R, int P, int kPrefetch, class W>
__attribute__((noinline)) void tile(const TileArgs<W>& args) {
  constexpr int kVecs = P * kPanelVecs;
  const int64_t panel_stride = args.panel_stride;
  const int64_t ahead_stride = panel_stride * static_cast<int64_t>(sizeof(W));
  const W* w = args.w;
  const float* x = args.x;
  const char* ahead = args.ahead;
  const Place before = args.before, after = args.after;

  Vec sum[R][kVecs];
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec{};
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) __builtin_prefetch(after.at + r * after.row + p * after.panel, 1);
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec b[kVecs];
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) load_panel(w + p * panel_stride + k * kPanel, b + p * kPanelVecs);
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      const Element a = element(x[r * kXStride + k]);
      EFFINFER_UNROLL
      for (int v = 0; v < kVecs; ++v) accumulate(sum[r][v], a, b[v]);
    }
  };
  // Spread out, and never a line twice: each prefetch holds one of the few miss buffers. Into L2:
  // L1 is full with this block.
  const auto prefetch_next = [&]() __attribute__((always_inline)) {
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) __builtin_prefetch(ahead + p * ahead_stride, 0, 2);
    ahead += kLine;
  };
  int64_t left = args.terms;
  if constexpr (kPrefetch == kInTurns) {
    for (; left >= kRound; left -= kRound) {
      EFFINFER_UNROLL
      for (int64_t k = 0; k < kRound; ++k) {
        if (k % kOften == 0) __builtin_prefetch(ahead + k / kOften * ahead_stride, 0, 2);
        step(k);
      }
      ahead += kLine;
      w += kRound * kPanel;
      x += kRound;
    }
  }
  for (; left >= kUnroll; left -= kUnroll) {
    EFFINFER_UNROLL
    for (int64_t k = 0; k < kUnroll; ++k) {
      if (kPrefetch >= kOften && k % kPrefetch == 0) prefetch_next();
      step(k);
    }
    w += kUnroll * kPanel;
    x += kUnroll;
  }
  for (; left > 0; --left) {
    step(0);
    w += kPanel;
    x += 1;
  }

  if (before.at != nullptr) {
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFINFER_UNROLL
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] += load(before.at + r * before.row + v / kPanelVecs * before.panel +
                          v % kPanelVecs * kLanes);
    }
  }
  EFFINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v)
      store(after.at + r * after.row + v / kPanelVecs * after.panel + v % kPanelVecs * kLanes,
            sum[r][v]);
  }
}

// The fewest rows of a tile: fewer of them, or one tile of float32, go other ways.
template <class W>
constexpr int kLeastTileRows = sizeof(W) == sizeof(float) ? (kTileHeight + 1) / 2 : 3;

// The tile of a run-time number of rows, kLeastTileRows <= rows <= R.
template <int R, int P, int kPrefetch, class W>
EFFINFER_INLINE void tile_of(int64_t rows, const TileArgs<W>& args) {
  if constexpr (R > kLeastTileRows<W>) {
    if (rows < R) return tile_of<R - 1, P, kPrefetch, W>(rows, args);
  }
  tile<R, P, kPrefetch, W>(args);
}

}  // namespace
}  // namespace effinfer
