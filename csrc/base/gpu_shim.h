// CUDA's execution model on one CPU thread, for testing the logic of every cuda.cu without a GPU:
// the threads of a block are fibers that switch at barriers and shuffles. Blocks run one after
// another, threads in a fixed order, so a run is repeatable; a barrier that some threads never
// reach is reported, not waited for. It says nothing about speed or the GPU's memory model.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "base/scalar.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace effinfer::gpu::shim {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// The running thread's place; set by the scheduler at every switch.
extern Index thread_index, block_index;
extern Index block_size, grid_size;
extern unsigned char* shared_memory;

// The statuses a launch can return, numbered as in CUDA.
enum Status : int { kSuccess = 0, kInvalidConfiguration = 9, kLaunchFailure = 719 };

// Runs body(ctx) once per thread of the grid.
int run(dim3 grid, int threads, size_t shared_bytes, void (*body)(void*), void* ctx);

// What the last failed run on this thread had to say.
const char* last_error();

// Runs threads and warps last to first. Results that differ between the orders betray a missing
// barrier.
void set_reverse(bool reverse);

// Where a thread waits: a call site, for telling divergent barriers apart and for messages.
struct Site {
  const char* file;
  int line;
};
void wait_block(Site site);
void wait_warp(Site site);

// Gives `bytes` of this lane to the warp and waits for the others; then lane(i) is what lane i
// gave, valid until this thread's next exchange.
constexpr size_t kExchangeBytes = 32;
void exchange(const void* mine, size_t bytes, Site site);
const void* exchanged(int lane);

}  // namespace effinfer::gpu::shim

// NOLINTBEGIN: CUDA's names
inline const effinfer::gpu::shim::Index& threadIdx = effinfer::gpu::shim::thread_index;
inline const effinfer::gpu::shim::Index& blockIdx = effinfer::gpu::shim::block_index;
inline const effinfer::gpu::shim::Index& blockDim = effinfer::gpu::shim::block_size;
inline const effinfer::gpu::shim::Index& gridDim = effinfer::gpu::shim::grid_size;
// NOLINTEND

namespace effinfer::gpu {

#define EFFINFER_SHIM_SITE shim::Site site = {__builtin_FILE(), __builtin_LINE()}

template <class T>
inline T* shared() {
  return reinterpret_cast<T*>(shim::shared_memory);
}

inline void sync_block(EFFINFER_SHIM_SITE) { shim::wait_block(site); }
inline void sync_warp(EFFINFER_SHIM_SITE) { shim::wait_warp(site); }

inline float shuffle(float x, int from, EFFINFER_SHIM_SITE) {
  shim::exchange(&x, sizeof(x), site);
  return *static_cast<const float*>(shim::exchanged(from & 31));
}
inline float shuffle_xor(float x, int mask, EFFINFER_SHIM_SITE) {
  return shuffle(x, (static_cast<int>(threadIdx.x) & 31) ^ mask, site);
}
inline float shuffle_up(float x, int n, EFFINFER_SHIM_SITE) {  // the first n lanes keep theirs
  const int lane = static_cast<int>(threadIdx.x) & 31;
  return shuffle(x, lane < n ? lane : lane - n, site);
}

#undef EFFINFER_SHIM_SITE

using scalar::bits_to_float;
using scalar::float_to_bits;
inline float half_to_float(uint16_t h) {
  const f16 value = {h};
  return scalar::get(&value);
}
inline uint16_t float_to_half(float x) {
  f16 value;
  scalar::put(&value, x);
  return value.bits;
}

}  // namespace effinfer::gpu
