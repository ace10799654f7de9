// Packed weights on a GPU. Four consecutive k of an output, a quad, are the bytes of a word: what
// the tensor cores' integer product takes, and what becomes two pairs of 16-bit floats in a few
// instructions. A byte is step * code, so that value - zero is it less a zero code or the centre.
#pragma once
#include "base/gpu_packed.h"
#include "ops/lowbit_linear/lowbit_linear.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;

// A word per output, of outputs side by side: one aligned access.
template <int N>
struct alignas(4 * N) Words {
  uint32_t v[N];
};

template <int N>
__device__ Words<N> words_at(const uint8_t* p) {
  return *reinterpret_cast<const Words<N>*>(p);
}

// The bytes at p, a word for each.
template <int N>
__device__ Words<N> bytes_at(const uint8_t* p) {
  Words<N> out;
  if constexpr (N == 1) {
    out.v[0] = *p;
  } else {
    static_assert(N == 4);
    const uint32_t all = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] = all >> 8 * n & 0xff;
  }
  return out;
}

// Four bits as four bytes.
__device__ inline uint32_t spread(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

// Quad kThird of three from four triples of ternary_dense: their magnitudes, four bits each, and
// which are negative.
template <int kThird>
__device__ uint32_t dense_quad(uint32_t magnitudes, uint32_t negative) {
  // Digit + 1 of the magnitudes 0 to 13, two bits each, the digit of 9 first.
  constexpr uint32_t kDigits[] = {0x0aaaa955u, 0x0a9502a5u, 0x09249249u};
  uint32_t quad = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 4 * kThird + i, triple = at / 3;
    const uint32_t magnitude = magnitudes >> 4 * triple & 15;
    const uint32_t code = kDigits[at % 3] >> 2 * magnitude & 3;
    quad |= ((negative >> triple & 1) != 0 ? 2 - code : code) << 8 * i;
  }
  return quad;
}

// Quad `part` (k = 4 part .. 4 part + 3 of a unit) of N outputs from `first` on.
template <LowbitFormat F, int N>
__device__ Words<N> quads(const uint8_t* unit, int first, int part) {
  Words<N> out;
  if constexpr (F == LowbitFormat::int3) {
    const Words<N> low = words_at<N>(unit + part / 4 * 64 + 4 * first);
    const Words<N> high = words_at<N>(unit + 128 + 4 * first);
#pragma unroll
    for (int n = 0; n < N; ++n)
      out.v[n] = (low.v[n] >> 2 * (part % 4) & 0x03030303u) | (high.v[n] >> part & 0x01010101u)
                                                                  << 2;
  } else if constexpr (F == LowbitFormat::binary) {
    const Words<N> bytes = bytes_at<N>(unit + 16 * (part / 2) + first);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] = 2 * spread(bytes.v[n] >> 4 * (part % 2) & 15);
  } else if constexpr (F == LowbitFormat::ternary_dense) {
    const int four = part / 3;  // triples
    const Words<N> low = bytes_at<N>(unit + 32 * four + first);
    const Words<N> high = bytes_at<N>(unit + 32 * four + 16 + first);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint32_t magnitudes = low.v[n] | high.v[n] << 8;
      const uint32_t negative =
          uint32_t{reinterpret_cast<const uint16_t*>(unit + 128)[first + n]} >> 4 * four;
      out.v[n] = part % 3 == 0   ? dense_quad<0>(magnitudes, negative)
                 : part % 3 == 1 ? dense_quad<1>(magnitudes, negative)
                                 : dense_quad<2>(magnitudes, negative);
    }
  } else if constexpr (F == LowbitFormat::int8) {
    out = words_at<N>(unit + 4 * first);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] ^= 0x80808080u;  // codes, from values
  } else {
    constexpr int kBits = F == LowbitFormat::int4 ? 4 : 2;
    constexpr uint32_t kMask = (1 << kBits) - 1;
    out = words_at<N>(unit + 4 * first);
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] = out.v[n] >> kBits * part & 0x01010101u * kMask;
  }
  return out;
}

// What value - zero lacks to a quad's bytes, of output `lane` of a panel in group g.
__device__ inline int zero_at(const LowbitWeight& w, int64_t panel, int64_t g, int lane) {
  return w.zero != nullptr ? w.zero[panel * w.scale_stride + g * kPanel + lane]
                           : lowbit::layout(w.format).centre;
}
__device__ inline float scale_at(const LowbitWeight& w, int64_t panel, int64_t g, int lane) {
  return gpu::load_any(w.scale, w.scale_type, panel * w.scale_stride + g * kPanel + lane);
}
__device__ inline float offset_at(const LowbitWeight& w, int64_t panel, int64_t g, int lane) {
  return gpu::load_any(w.offset, w.scale_type, panel * w.scale_stride + g * kPanel + lane);
}

}  // namespace
}  // namespace effinfer
