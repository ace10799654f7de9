// silu_mul over vec.h. An element's bits don't depend on where in a vector it falls.
#include "ops/norm/rows.h"
#include "ops/silu_mul/silu_mul.h"

namespace effinfer {
namespace {

void dispatch(const SiluMul& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* const gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
      const T* const up = static_cast<const T*>(a.up) + row * a.up_stride;
      T* const y = static_cast<T*>(a.y) + row * a.y_stride;
      each_vector(a.dim, [&](auto access, int64_t i) {
        access.put(y + i, silu(access.get(gate + i)) * access.get(up + i));
      });
    }
  });
}

}  // namespace
}  // namespace effinfer
