// Up to kLanes elements `stride` apart, in the lanes: what the convolutions read and write where a
// layout or a tail asks for it. The whole vector is a case of its own, for with a constant count
// the compiler needs no loop.
#pragma once
#include "base/vec.h"

namespace effinfer {
namespace {

template <class T>
EFFINFER_INLINE Vec load_lanes(const T* p, int64_t stride, int64_t n) {
  if (n < kLanes) return load_strided(p, stride, n);
  return stride == 1 ? load(p) : load_strided(p, stride);
}

template <class T>
EFFINFER_INLINE void store_lanes(T* p, int64_t stride, Vec x, int64_t n) {
  if (n < kLanes) return store_strided(p, stride, x, n);
  return stride == 1 ? store(p, x) : store_strided(p, stride, x);
}

}  // namespace
}  // namespace effinfer
