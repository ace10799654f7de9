// Which positions of a sequence a block takes next, for the GPU scans. A position whose mask is 0
// is not a token: chunks are counted in tokens, so that a masked sequence is cut, and so rounded,
// like the same sequence without those positions.
#pragma once
#include "base/gpu.h"

namespace effinfer {
namespace {

struct Walk {
  const uint8_t* mask;  // of this batch row, or null
  int64_t mask_time, begin, end;
  bool reverse;
  int64_t next;  // positions passed so far

  __device__ int64_t steps() const { return end > begin ? end - begin : 0; }
  __device__ int64_t position(int64_t step) const {
    return reverse ? end - 1 - step : begin + step;
  }
  __device__ bool is_token(int64_t position) const {
    return mask == nullptr || mask[position * mask_time] != 0;
  }
};

// A sequence's range; what lies on the GPU was not checked on the host.
__device__ inline void set_range(Walk& walk, const int32_t* cu_seqlens, int64_t sequence,
                                 int64_t length) {
  const int64_t begin = cu_seqlens != nullptr ? cu_seqlens[sequence] : 0;
  const int64_t end = cu_seqlens != nullptr ? cu_seqlens[sequence + 1] : length;
  walk.begin = begin < 0 ? 0 : begin;
  walk.end = end > length ? length : end;
}

// How many tokens the sequence has. `scratch`: a float per warp.
template <int kThreads>
__device__ int64_t count_tokens(const Walk& walk, float* scratch) {
  if (walk.mask == nullptr) return walk.steps();
  float count = 0.f;  // exact up to 2^24
  for (int64_t t = walk.begin + threadIdx.x; t < walk.end; t += kThreads)
    count += walk.is_token(t) ? 1.f : 0.f;
  return static_cast<int64_t>(gpu::block_sum(count, scratch));
}

// Writes the positions of the next kChunk tokens, -1 where there are no more, and calls skip(p) for
// every masked position on the way (for some more than once). Returns how many tokens it found.
// A barrier must stand between the last use of `positions` and this; one stands at its end.
// `scratch`: a float per warp and one more.
template <int kChunk, int kThreads, class Skip>
__device__ int next_tokens(Walk& walk, int* positions, float* scratch, Skip&& skip) {
  constexpr int kWarps = kThreads / gpu::kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t left = walk.steps() - walk.next;
  if (walk.mask == nullptr) {
    const int count = static_cast<int>(left < kChunk ? left : kChunk);
    for (int i = thread; i < kChunk; i += kThreads)
      positions[i] = i < count ? static_cast<int>(walk.position(walk.next + i)) : -1;
    walk.next += count;
    gpu::sync_block();
    return count;
  }
  for (int i = thread; i < kChunk; i += kThreads) positions[i] = -1;
  int found = 0;
  while (found < kChunk && walk.next < walk.steps()) {
    const int64_t step = walk.next + thread, p = walk.position(step);
    const bool in = step < walk.steps(), token = in && walk.is_token(p);
    float rank = token ? 1.f : 0.f;  // tokens up to this one
    for (int m = 1; m < gpu::kWarp; m *= 2) {
      const float before = gpu::shuffle_up(rank, m);
      if (gpu::lane() >= m) rank += before;
    }
    gpu::sync_block();  // positions are cleared, scratch is free
    if (gpu::lane() == gpu::kWarp - 1) scratch[gpu::warp()] = rank;
    gpu::sync_block();
    int index = found + static_cast<int>(rank) - 1, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int tokens = static_cast<int>(scratch[w]);
      if (w < gpu::warp()) index += tokens;
      total += tokens;
    }
    if (token && index < kChunk) positions[index] = static_cast<int>(p);
    if (token && index == kChunk - 1) scratch[kWarps] = static_cast<float>(thread + 1);
    if (in && !token) skip(p);
    gpu::sync_block();
    const bool full = found + total >= kChunk;
    walk.next += full ? static_cast<int>(scratch[kWarps]) : kThreads;
    found = full ? kChunk : found + total;
  }
  gpu::sync_block();
  return found;
}

}  // namespace
}  // namespace effinfer
