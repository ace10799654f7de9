// The fixed epilogue on vec.h's integers.
#pragma once
#include "base/vec.h"
#include "ops/binary_conv2d/binary_conv2d.h"

namespace effinfer {
namespace {

using namespace binary_layout;

EFFINFER_INLINE IVec clamped(IVec v) {
  const IVec most = splat_i(kFixedLimit);
  v = v > most ? most : v;
  return v < -most ? -most : v;
}

// Up to kLanes integers, zeros past `left`; and their store.
EFFINFER_INLINE IVec load_integers(const int32_t* p, int64_t left) {
  const auto* const at = reinterpret_cast<const float*>(p);
  return bits_of(left >= kLanes ? load(at) : load_n(at, left));
}
EFFINFER_INLINE void store_integers(int32_t* p, IVec v, int64_t left) {
  auto* const at = reinterpret_cast<float*>(p);
  if (left >= kLanes)
    store(at, from_bits(v));
  else
    store_n(at, from_bits(v), left);
}

EFFINFER_INLINE void finish_fixed(const FixedTask& t) {
  const int64_t rows = t.rows, stride = t.y_stride;
  for (int64_t n = 0; n < t.outputs; n += kLanes) {
    const int64_t left = t.outputs - n;
    const IVec gain = load_integers(t.epilogue.gain_shift + n, left);
    const IVec pre = load_integers(t.epilogue.pre_bias + n, left);
    const IVec slope = load_integers(t.epilogue.slope_shift + n, left);
    const IVec post = load_integers(t.epilogue.post_bias + n, left);
    const int32_t* const counts = t.counts + n / kPart * rows * kPart + n % kPart;
    for (int64_t r = 0; r < rows; ++r) {
      const IVec dot = splat_i(t.terms[r]) - 2 * load_integers(counts + r * kPart, kLanes);
      IVec a = (dot << gain) + pre;
      if (t.residual != nullptr) a += clamped(load_integers(t.residual + r * stride + n, left));
      a = a < 0 ? a >> slope : a;
      store_integers(t.y + r * stride + n, clamped(a + post), left);
    }
  }
}

}  // namespace
}  // namespace effinfer
