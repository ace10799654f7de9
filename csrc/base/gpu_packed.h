// Bytes and 16-bit pairs packed in words, and the tensor cores' integer product: thin wrappers of
// PTX, with the same meaning in plain C++ on the shim.
#pragma once
#include <type_traits>

#include "base/gpu_mma.h"

namespace effinfer::gpu {

// C of mma.m16n8k16 with 8-bit integers, laid out as FragmentC.
struct FragmentS {
  int32_t v[4];
};

// Four bytes of a (numbers 0 to 3) and b (4 to 7), the lowest nibble of `select` says the lowest.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
#if defined(EFFINFER_CUDA_SHIM)
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
#else
  return __byte_perm(a, b, select);
#endif
}

// a b + c for two bf16 or f16 each, rounded once.
template <class T>
__device__ inline uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
#if defined(EFFINFER_CUDA_SHIM)
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [&](uint32_t word) {
      const T value = {static_cast<uint16_t>(word >> i)};
      return load(&value);
    };
    T rounded;
    store(&rounded, fmaf(half(a), half(b), half(c)));
    out |= uint32_t{rounded.bits} << i;
  }
  return out;
#else
  uint32_t out;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
#endif
}

// c += a b, a 16 x 16 of unsigned bytes, b 16 x 8 of signed ones, exact. With g = lane / 4 and
// t = lane % 4, a's words are (g, 4t..) and (g + 8, 4t..), b's is (4t.., g): four along k each.
#if defined(EFFINFER_CUDA_SHIM)
inline void mma_bytes(FragmentS& c, const uint32_t (&a)[2], uint32_t b,
                      shim::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  const uint32_t mine[3] = {a[0], a[1], b};
  shim::exchange(mine, sizeof(mine), site);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const auto* of_a = static_cast<const uint32_t*>(shim::exchanged(4 * g + k / 4));
      const auto* of_b = static_cast<const uint32_t*>(shim::exchanged(4 * (2 * t + i % 2) + k / 4));
      c.v[i] += static_cast<uint8_t>(of_a[i / 2] >> 8 * (k % 4)) *
                static_cast<int8_t>(of_b[2] >> 8 * (k % 4));
    }
}
#else
__device__ inline void mma_bytes(FragmentS& c, const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(c.v[0]), "+r"(c.v[1]), "+r"(c.v[2]), "+r"(c.v[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
#endif

}  // namespace effinfer::gpu
