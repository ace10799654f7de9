// Everything a cuda.cu needs from CUDA, in one place. Compiled by nvcc it is thin wrappers;
// compiled as C++ with EFFINFER_CUDA_SHIM the same names run on the CPU (gpu_shim.h), so that a
// kernel's logic is tested where there is no GPU. Rules for kernels: one-dimensional blocks of
// whole warps, shared memory through shared<T>(), barriers and shuffles through these wrappers
// only.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

#if defined(EFFINFER_CUDA_SHIM)
#include "base/gpu_shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace effinfer::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue: a size the kernels do not go up to
constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

// ---- launching, on the host ---------------------------------------------------------------------

// Runs `kernel` on `stream` without waiting; returns a cudaError_t as int. An empty grid is no
// work.
#if defined(EFFINFER_CUDA_SHIM)
template <class... P, class... A>
inline int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                  A... args) {
  static_cast<void>(stream);
  auto body = [&] { kernel(args...); };
  return shim::run(
      grid, threads, shared_bytes, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
}
#else
template <class... P, class... A>
inline int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                  A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more than the default has to be asked for
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}
#endif

// ---- inside a kernel ----------------------------------------------------------------------------

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

#if !defined(EFFINFER_CUDA_SHIM)

// The block's shared memory, as large as the launch said, 16-byte aligned.
template <class T>
__device__ inline T* shared() {
  extern __shared__ __align__(16) unsigned char effinfer_shared_memory[];
  return reinterpret_cast<T*>(effinfer_shared_memory);
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline float shuffle(float x, int from) { return __shfl_sync(kAllLanes, x, from); }
__device__ inline float shuffle_xor(float x, int m) { return __shfl_xor_sync(kAllLanes, x, m); }
__device__ inline float shuffle_up(float x, int n) { return __shfl_up_sync(kAllLanes, x, n); }

__device__ inline float bits_to_float(uint32_t u) { return __uint_as_float(u); }
__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ inline float half_to_float(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
__device__ inline uint16_t float_to_half(float x) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

#endif

__device__ inline int popcount(uint32_t word) {
#if defined(EFFINFER_CUDA_SHIM)
  return __builtin_popcount(word);
#else
  return __popc(word);
#endif
}

// a b + c; rounded once on the GPU, twice on the shim, but always the same way in either.
__device__ inline float fma(float a, float b, float c) {
#if defined(EFFINFER_CUDA_SHIM)
  return a * b + c;
#else
  return __fmaf_rn(a, b, c);
#endif
}

// a b, rounded: never half of a fused multiply-add.
__device__ inline float mul(float a, float b) {
#if defined(EFFINFER_CUDA_SHIM)
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

__device__ inline float load(const float* p) { return *p; }
__device__ inline float load(const bf16* p) { return bits_to_float(uint32_t{p->bits} << 16); }
__device__ inline float load(const f16* p) { return half_to_float(p->bits); }

__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(bf16* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(x);
  p->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
__device__ inline void store(f16* p, float x) { p->bits = float_to_half(x); }

// Element i of an array whose type is known only at run time: one branch, the same for all threads.
// For the lesser operands of an op, where a template parameter would triple the compile time.
__device__ inline float load_any(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::bf16:
      return load(static_cast<const bf16*>(p) + i);
    case DType::f16:
      return load(static_cast<const f16*>(p) + i);
    default:
      return static_cast<const float*>(p)[i];
  }
}
__device__ inline void store_any(void* p, DType type, int64_t i, float x) {
  switch (type) {
    case DType::bf16:
      return store(static_cast<bf16*>(p) + i, x);
    case DType::f16:
      return store(static_cast<f16*>(p) + i, x);
    default:
      static_cast<float*>(p)[i] = x;
  }
}

// x as an element of this type would keep it.
__device__ inline float rounded(float x, DType type) {
  union {
    float f32;
    bf16 half_bf16;
    f16 half_f16;
  } kept = {x};
  store_any(&kept, type, 0, x);
  return load_any(&kept, type, 0);
}

// Four floats that move as one 16-byte access.
struct alignas(16) Four {
  float v[4];
};

// Sums over kLanes neighbouring threads, a warp or a block, in one fixed order; every thread gets
// the result.
template <int kLanes>
__device__ inline float lanes_sum(float x) {
#pragma unroll
  for (int m = kLanes / 2; m > 0; m /= 2) x += shuffle_xor(x, m);
  return x;
}

__device__ inline float warp_sum(float x) { return lanes_sum<kWarp>(x); }

// `scratch` holds one float per warp of the block; it may be reused after the next barrier.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (lane() == 0) scratch[warp()] = x;
  sync_block();
  float total = 0.f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += scratch[w];
  return total;
}

// exp2 in the special function unit alone, within 2 ulp; results below 2^-126 are zero.
__device__ inline float exp2_fast(float x) {
#if defined(EFFINFER_CUDA_SHIM)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// expf and log1pf are within 2 ulp on both sides (nvcc is never run with --use_fast_math).
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ inline float silu(float x) { return x / (1.f + expf(-x)); }

}  // namespace effinfer::gpu
