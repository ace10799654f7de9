// Tensor cores and asynchronous copies for a cuda.cu: thin wrappers of PTX, with the same layouts
// in plain C++ on the shim. Fragments are PTX's of mma.m16n8k16; with g = lane / 4, t = lane % 4:
//   A, 16 x 16:  words (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..), a pair along k
//   B, 16 x 8:   words (2t.., g), (2t + 8.., g)
//   C, 16 x 8:   (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// and of mma.m16n8k256 on bits, C as above in int32:
//   A, 16 x 256: words of 32 bits (g, 32t..), (g + 8, 32t..), (g, 32t + 128..), (g + 8, 32t +
//   128..) B, 256 x 8:  words (32t.., g), (32t + 128.., g)
#pragma once
#include <cstring>
#include <type_traits>

#include "base/gpu.h"

namespace effinfer::gpu {

struct FragmentA {
  uint32_t word[4];
};
struct FragmentB {
  uint32_t word[2];
};
struct FragmentC {
  float v[4];
};
struct IntegerFragmentC {
  int32_t v[4];
};

#if defined(EFFINFER_CUDA_SHIM)

#define EFFINFER_SHIM_SITE shim::Site site = {__builtin_FILE(), __builtin_LINE()}

// c += a b with T = bf16 or f16. The GPU's rounding of these sums is its own, but one and the same
// for every element of a fragment.
template <class T>
inline void mma(FragmentC& c, const FragmentA& a, const FragmentB& b, EFFINFER_SHIM_SITE) {
  struct Given {
    FragmentA a;
    FragmentB b;
  } mine = {a, b};
  shim::exchange(&mine, sizeof(mine), site);
  const auto element = [](uint32_t word, int half) {
    const T value = {static_cast<uint16_t>(word >> (16 * half))};
    return load(&value);
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const int column = 2 * t + i % 2, owner = k % 8 / 2;
      const auto* of_a = static_cast<const Given*>(shim::exchanged(4 * g + owner));
      const auto* of_b = static_cast<const Given*>(shim::exchanged(4 * column + owner));
      c.v[i] +=
          element(of_a->a.word[i / 2 + k / 8 * 2], k % 2) * element(of_b->b.word[k / 8], k % 2);
    }
}

// c += popcount(a & b) over 256 bits.
inline void mma_and_popcount(IntegerFragmentC& c, const FragmentA& a, const FragmentB& b,
                             EFFINFER_SHIM_SITE) {
  struct Given {
    FragmentA a;
    FragmentB b;
  } mine = {a, b};
  shim::exchange(&mine, sizeof(mine), site);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int word = 0; word < 8; ++word) {
      const int column = 2 * t + i % 2, owner = word % 4;
      const auto* of_a = static_cast<const Given*>(shim::exchanged(4 * g + owner));
      const auto* of_b = static_cast<const Given*>(shim::exchanged(4 * column + owner));
      c.v[i] += popcount(of_a->a.word[i / 2 + word / 4 * 2] & of_b->b.word[word / 4]);
    }
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i says where row i % 8 of matrix
// i / 8 lies, 16-byte aligned. Word m holds elements 2t and 2t + 1 of row g of matrix m; of column
// g when kTransposed.
template <bool kTransposed>
inline void load_matrices(uint32_t (&word)[4], const void* row, EFFINFER_SHIM_SITE) {
  shim::exchange(&row, sizeof(row), site);
  const int g = lane() / 4, t = lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int from = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
      pair[i] = (*static_cast<const uint16_t* const*>(shim::exchanged(8 * m + from)))[column];
    }
    word[m] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

#undef EFFINFER_SHIM_SITE

inline void copy16(void* to, const void* from, bool in) {
  in ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
}
inline void commit_copies() {}
template <int kPending>
inline void wait_copies() {}

#else

template <class T>
__device__ inline void mma(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
          "r"(b.word[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
          "r"(b.word[1]));
}

// XOR is emulated by two of these on sm_90, and AND itself by IMMA on sm_120.
__device__ inline void mma_and_popcount(IntegerFragmentC& c, const FragmentA& a,
                                        const FragmentB& b) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c.v[0]), "+r"(c.v[1]), "+r"(c.v[2]), "+r"(c.v[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
        "r"(b.word[1]));
}

template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&word)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, or zeros, without waiting. Both are 16-byte aligned.
__device__ inline void copy16(void* to, const void* from, bool in) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(in ? 16 : 0)
               : "memory");
}
// The copies so far are one group; wait until at most kPending groups are on their way. What other
// threads copied is there after a barrier.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace effinfer::gpu
