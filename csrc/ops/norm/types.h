// The element types a norm with a residual is compiled for: residual and residual_out are each
// float32 or x's own type, seven combinations of the 27 (the Python ops widen the others first).
#pragma once
#include "base/dtype.h"

namespace effinfer {

inline bool norm_takes(DType x, DType residual, DType residual_out) {
  return (residual == x || residual == DType::f32) &&
         (residual_out == DType::f32 || (residual_out == x && residual == x));
}

// Calls f(x, residual, residual_out) with values of the C++ types; norm_takes() must hold.
template <class F>
inline void with_norm_types(DType x_type, DType residual, DType residual_out, F&& f) {
  with_type(x_type, [&](auto x) {
    if (residual == x_type && residual_out == x_type)
      f(x, x, x);
    else if (residual == x_type)
      f(x, x, float{});
    else
      f(x, float{}, float{});
  });
}

}  // namespace effinfer
