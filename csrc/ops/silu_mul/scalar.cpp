// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/silu_mul/silu_mul.h"

namespace effinfer {

void silu_mul_scalar(const SiluMul& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < a.dim; ++i) {
        const float gate = scalar::get(static_cast<const T*>(a.gate) + row * a.gate_stride + i);
        const float up = scalar::get(static_cast<const T*>(a.up) + row * a.up_stride + i);
        scalar::put(static_cast<T*>(a.y) + row * a.y_stride + i, scalar::silu(gate) * up);
      }
  });
}

}  // namespace effinfer
