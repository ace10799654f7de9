// Rows of any float type to and from float32 buffers, shared by the vector files of the scan ops.
#pragma once
#include "base/vec.h"

namespace effinfer {
namespace {

constexpr float kLog2e = 1.44269504f;

EFFINFER_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// to[i] = from[i * stride], i < n; writes zeros up to the next multiple of kLanes.
template <class T>
EFFINFER_INLINE void load_row(float* to, const T* from, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i += kLanes)
    store(to + i, load_strided(from + i * stride, stride, least(kLanes, n - i)));
}

template <class T>
EFFINFER_INLINE void store_row(T* to, const float* from, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; i += kLanes)
    store_strided(to + i * stride, stride, load(from + i), least(kLanes, n - i));
}

inline void load_row(float* to, const void* from, DType type, int64_t offset, int64_t stride,
                     int64_t n) {
  with_type(type, [&](auto t) {
    load_row(to, static_cast<const decltype(t)*>(from) + offset, stride, n);
  });
}

inline void store_row(void* to, DType type, int64_t offset, const float* from, int64_t stride,
                      int64_t n) {
  with_type(type,
            [&](auto t) { store_row(static_cast<decltype(t)*>(to) + offset, from, stride, n); });
}

}  // namespace
}  // namespace effinfer
