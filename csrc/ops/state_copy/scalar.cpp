// The definition, and the only kernel: memcpy is as fast as this gets.
#include <cstring>

#include "ops/state_copy/state_copy.h"

namespace effinfer {
namespace {

void copy_state(const StateCopy& a, char* dst, const char* src, int dim) {
  if (dim == kStateDims) {
    std::memcpy(dst, src, static_cast<size_t>(a.run));
    return;
  }
  for (int64_t i = 0; i < a.size[dim]; ++i)
    copy_state(a, dst + i * a.dst_stride[dim], src + i * a.src_stride[dim], dim + 1);
}

}  // namespace

void state_copy_scalar(const StateCopy& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t to = a.dst_slots[i], from = a.src_slots[i];
    if (to < 0 || from < 0) continue;
    copy_state(a, static_cast<char*>(a.dst) + to * a.dst_slot,
               static_cast<const char*>(a.src) + from * a.src_slot, 0);
  }
}

}  // namespace effinfer
