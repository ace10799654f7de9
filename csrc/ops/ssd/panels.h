// Between memory and packed panels [panel][row][16]: x in, y out, states in and out.
#pragma once
#include "ops/scan/rows.h"
#include "ops/scan/transpose.h"
#include "ops/ssd/tile.h"

namespace effinfer {
namespace {

// Tokens' x of a panel that is whole and dense in memory, packed.
template <class T>
__attribute__((noinline)) void load_panel_rows(const T* x, int64_t time, const int64_t* positions,
                                               int64_t count, float* X) {
  for (int64_t i = 0; i < count; ++i) {
    const T* const from = x + positions[i] * time;
    EFFINFER_UNROLL
    for (int v = 0; v < kPanel; v += kLanes) store(X + i * kPanel + v, load(from + v));
  }
}

// y = (Y + D x) silu(z) of the same, from packed form.
template <class T, bool kGated>
__attribute__((noinline)) void store_panel_rows(const float* Y, const float* X, const float* D,
                                                const T* z, int64_t z_time, T* y, int64_t y_time,
                                                const int64_t* positions, int64_t count) {
  Vec skip[kVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) skip[v] = D != nullptr ? load(D + v * kLanes) : Vec{};
  for (int64_t i = 0; i < count; ++i) {
    T* const to = y + positions[i] * y_time;
    EFFINFER_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      Vec out = load(Y + i * kPanel + v * kLanes);
      if (D != nullptr) out = fma(skip[v], load(X + i * kPanel + v * kLanes), out);
      if constexpr (kGated) out = out * silu(load(z + positions[i] * z_time + v * kLanes));
      store(to + v * kLanes, out);
    }
  }
}

template <int kWrite, class T>
EFFINFER_INLINE void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(from + i, kWrite);
}

// A state [P, N] packed as [panel of P][n][16].
void pack_state(const Ssd& a, const SsdScratch& at, const float* from, float* to) {
  const int64_t P = a.head_dim, N = a.state_dim, part = at.state_rows * kPanel;
  if (P % kPanel != 0 || N < at.state_rows)
    __builtin_memset(to, 0, static_cast<size_t>(at.state_floats) * sizeof(float));
  for (int64_t p = 0; p < P; p += kPanel)
    transpose(from + p * N, N, least(kPanel, P - p), N, to + p / kPanel * part, kPanel);
}

void unpack_state(const Ssd& a, const SsdScratch& at, const float* from, float* to) {
  const int64_t P = a.head_dim, N = a.state_dim, part = at.state_rows * kPanel;
  for (int64_t p = 0; p < P; p += kPanel)
    transpose(from + p / kPanel * part, kPanel, N, least(kPanel, P - p), to + p * N, N);
}

}  // namespace
}  // namespace effinfer
