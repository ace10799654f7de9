// Copies states between the slots of two pools, byte for byte: gather, scatter, fork, rollback.
//
//   for each i:  dst[dst_slots[i]] = src[src_slots[i]]      unless one of the two is -1
//
// No destination may be named twice, nor be the source of another copy: the order never matters.
// Layout: a state is up to 5 dimensions with any strides; dense states are one memcpy each.
// Cost: bytes: each copied state read once and written once.
#pragma once
#include "base/cpu.h"

namespace effinfer {

constexpr int kStateDims = 5;

struct StateCopy {
  void* dst;
  const void* src;
  const int32_t* dst_slots;  // [count]
  const int32_t* src_slots;  // [count]
  int64_t count;
  int64_t dst_pool, src_pool;  // slots in each pool
  int64_t dst_slot, src_slot;  // bytes between slots
  int64_t run;                 // bytes of the innermost dense run
  // The dimensions around that run, outermost first, 1 where unused; strides in bytes.
  int64_t size[kStateDims], dst_stride[kStateDims], src_stride[kStateDims];
};

using StateCopyFn = void (*)(const StateCopy&, int64_t begin, int64_t end);

const Kernel<StateCopyFn>& state_copy_kernel();
void state_copy(const StateCopy& args);

void state_copy_scalar(const StateCopy&, int64_t, int64_t);

int state_copy_cuda(const StateCopy&, void* stream);  // a cudaError_t

}  // namespace effinfer
