#include "ops/gated_rms_norm/gated_rms_norm.h"

#include "python/tensor.h"

namespace effinfer::gated_rms_norm_binding {

void run(py::handle x_, py::handle weight_, py::handle z_, double eps, int64_t group,
         bool norm_before_gate, py::handle y_) {
  constexpr auto op = "gated_rms_norm";
  const Rows x = want_rows(op, "x", x_, kFloats);
  const Rows z = want_rows(op, "z", z_, x.tensor.type, x.rows, x.dim, true);
  const Rows y = want_rows(op, "y", y_, x.tensor.type, x.rows, x.dim);
  const Tensor weight = want_dense(op, "weight", weight_, kF32, {x.dim});
  if (group == -1) group = x.dim > 0 ? x.dim : 1;  // one group
  if (group < 1 || x.dim % group != 0)
    reject(op, "group_size", "divide the last dimension " + std::to_string(x.dim),
           std::to_string(group));
  const GatedRmsNorm args = {
      .x = x.tensor.data,
      .z = z.tensor.data,
      .weight = weight.as<const float>(),
      .y = y.tensor.data,
      .rows = x.rows,
      .dim = x.dim,
      .group = group,
      .x_stride = x.stride,
      .z_stride = z.stride,
      .y_stride = y.stride,
      .type = x.tensor.dtype(),
      .eps = static_cast<float>(eps),
      .norm_before_gate = norm_before_gate,
  };
  RUN(gated_rms_norm, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("gated_rms_norm"); }

}  // namespace effinfer::gated_rms_norm_binding
