// Checks that rms_norm and layer_norm share.
#pragma once
#include "ops/norm/types.h"
#include "python/tensor.h"

namespace effinfer {

inline void want_norm_types(const char* op, const Rows& x, const Rows& residual, const Rows& out) {
  if (!out) reject(op, "residual_out", "be given with a residual", "None");
  if (!norm_takes(x.tensor.dtype(), residual.tensor.dtype(), out.tensor.dtype()))
    throw py::type_error(std::string(op) +
                         ": residual must be float32 or have x's dtype, and residual_out their "
                         "wider one or float32");
}

}  // namespace effinfer
