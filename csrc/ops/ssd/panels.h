// Between memory and packed panels [panel][row][16]: x in, y out, states in and out.
#pragma once
#include "ops/scan/rows.h"
#include "ops/scan/transpose.h"
#include "ops/ssd/tile.h"

namespace effinfer {
namespace {

// Tokens' x of some panels that are whole and dense in memory, packed.
__attribute__((noinline)) void load_panels(const void* x, DType type, int64_t from, int64_t time,
                                           const int64_t* positions, int64_t count, int64_t panels,
                                           float* X) {
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < count; ++i) {
      const auto* const row = static_cast<const decltype(t)*>(x) + from + positions[i] * time;
      for (int64_t p = 0; p < panels * kPanel; p += kPanel) EFFINFER_UNROLL
      for (int v = 0; v < kPanel; v += kLanes)
        store(X + p * kSsdChunk + i * kPanel + v, load(row + p + v));
    }
  });
}

// The rows of a panel, each times its weight.
__attribute__((noinline)) void weigh_rows(const float* X, const float* weights, int64_t count,
                                          float* Xw) {
  for (int64_t i = 0; i < count; ++i) EFFINFER_UNROLL
  for (int v = 0; v < kPanel; v += kLanes)
    store(Xw + i * kPanel + v, load(X + i * kPanel + v) * splat(weights[i]));
}

// y = (Y + D x) silu(z) of the same, from packed form; y and z are where the panel begins.
struct PanelOutput {
  const float* Y;
  const float* X;
  const float* D;  // or null
};
__attribute__((noinline)) void store_panel_rows(const PanelOutput& o, const Ssd& a, int64_t y,
                                                int64_t z, const int64_t* positions,
                                                int64_t count) {
  Vec skip[kVecs];
  EFFINFER_UNROLL
  for (int v = 0; v < kVecs; ++v) skip[v] = o.D != nullptr ? load(o.D + v * kLanes) : Vec{};
  with_type(a.x_type, [&](auto t) {
    using T = decltype(t);
    const int64_t y_time = a.y_strides[1], z_time = a.z_strides[1];
    const float *const X = o.X, *const Y = o.Y;
    T* const to = static_cast<T*>(a.y) + y;
    const T* const gates = a.z != nullptr ? static_cast<const T*>(a.z) + z : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      EFFINFER_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        Vec out = load(Y + i * kPanel + v * kLanes);
        if (o.D != nullptr) out = fma(skip[v], load(X + i * kPanel + v * kLanes), out);
        if (gates != nullptr) out = out * silu(load(gates + positions[i] * z_time + v * kLanes));
        store(to + positions[i] * y_time + v * kLanes, out);
      }
    }
  });
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
