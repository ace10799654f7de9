// One row of float activations: bound by the weights' bytes, so codes become weights in registers
// and several panels walk down k side by side.
#pragma once
#include "ops/linear/tile.h"
#include "ops/lowbit_linear/decode.h"

namespace effinfer {
namespace {

// Of packed weights, ahead of what is read. Far enough for the latency of memory.
constexpr int64_t kBytesAhead = 1024;

// gcc 12 else loads codes again for each of their four uses.
EFFINFER_INLINE IVec in_register(IVec x) { return bits_of(rounded(from_bits(x))); }

// sums [P, 16] = the block's weights times x
template <class D, int P>
__attribute__((noinline)) void stream(const PackedBlock& b, const float* x, float* sums) {
  const LowbitWeight w = *b.weight;
  const int64_t panel = b.panel, panel_stride = w.panel_stride, begin = b.begin;
  Vec sum[P][kVecsOfPanel];
  EFFINFER_UNROLL
  for (int p = 0; p < P; ++p) {
    EFFINFER_UNROLL
    for (int v = 0; v < kVecsOfPanel; ++v) sum[p][v] = Vec{};
  }
  each_group<D>(b, [&](const uint8_t* unit, int64_t k, int64_t end,
                       int64_t group) __attribute__((always_inline)) {
    typename D::Coefficients affine[P][kVecsOfPanel];
    EFFINFER_UNROLL
    for (int p = 0; p < P; ++p) {
      EFFINFER_UNROLL
      for (int v = 0; v < kVecsOfPanel; ++v)
        affine[p][v] = D::affine(w, (panel + p) * w.scale_stride + group * kPanel + v * kLanes);
    }
    const typename D::Coefficients* coefficients = affine[0];
    asm("" : "+r"(coefficients) : : "memory");  // from here on a pointer to who knows what
    const float* at = x + (k - begin);
    // Four k; of the last four perhaps fewer.
    const auto step = [&](int q, int64_t terms) __attribute__((always_inline)) {
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) {
        // Both read anew each time: registers are for sums and masks, which gcc 12 else spills.
        asm("" : "+r"(coefficients), "+r"(at));
        const auto* const c = coefficients + p * kVecsOfPanel;
        IVec bits[kVecsOfPanel];
        EFFINFER_UNROLL
        for (int v = 0; v < kVecsOfPanel; ++v)
          bits[v] = in_register(D::bits(unit + p * panel_stride, q, v, c[v]));
        const auto term = [&]<int i>() __attribute__((always_inline)) {
          if (i >= terms) return;
          const Element x_i = element(at[i]);
          EFFINFER_UNROLL
          for (int v = 0; v < kVecsOfPanel; ++v)
            accumulate(sum[p][v], x_i, D::template weight<i>(bits[v], c[v]));
        };
        term.template operator()<0>();
        term.template operator()<1>();
        term.template operator()<2>();
        term.template operator()<3>();
      }
      at += 4;
    };
    for (; k + D::unit_k <= end; k += D::unit_k) {
      EFFINFER_UNROLL
      for (int p = 0; p < P; ++p) {
        EFFINFER_UNROLL
        for (int line = 0; line < D::unit_bytes; line += kLine)
          __builtin_prefetch(unit + p * panel_stride + kBytesAhead + line);
      }
      EFFINFER_UNROLL
      for (int q = 0; q < D::unit_k / 4; ++q) step(q, 4);
      unit += D::unit_bytes;
    }
    for (int q = 0; k < end; ++q, k += 4) step(q, end - k);
  });
  EFFINFER_UNROLL
  for (int p = 0; p < P; ++p) {
    EFFINFER_UNROLL
    for (int v = 0; v < kVecsOfPanel; ++v) store(sums + p * kPanel + v * kLanes, sum[p][v]);
  }
}

}  // namespace
}  // namespace effinfer
