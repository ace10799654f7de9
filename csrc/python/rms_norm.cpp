#include "ops/rms_norm/rms_norm.h"

#include "python/norm.h"

namespace effinfer::rms_norm_binding {

void run(py::handle x_, py::handle weight_, double eps, py::handle residual_, bool unit_offset,
         py::handle y_, py::handle residual_out_) {
  constexpr auto op = "rms_norm";
  const Rows x = want_rows(op, "x", x_, kFloats);
  const Rows y = want_rows(op, "y", y_, x.tensor.type, x.rows, x.dim);
  const Tensor weight = want_dense(op, "weight", weight_, kF32, {x.dim});
  const Rows residual = want_rows(op, "residual", residual_, kFloats, x.rows, x.dim, true);
  const Rows out = want_rows(op, "residual_out", residual_out_, kFloats, x.rows, x.dim, true);
  if (residual) want_norm_types(op, x, residual, out);
  const RmsNorm args = {
      .x = x.tensor.data,
      .residual = residual.tensor.data,
      .weight = weight.as<const float>(),
      .y = y.tensor.data,
      .residual_out = out.tensor.data,
      .rows = x.rows,
      .dim = x.dim,
      .x_stride = x.stride,
      .residual_stride = residual.stride,
      .y_stride = y.stride,
      .residual_out_stride = out.stride,
      .x_type = x.tensor.dtype(),
      .residual_type = (residual ? residual : x).tensor.dtype(),
      .residual_out_type = (out ? out : x).tensor.dtype(),
      .eps = static_cast<float>(eps),
      .unit_offset = unit_offset,
  };
  RUN(rms_norm, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("rms_norm"); }

}  // namespace effinfer::rms_norm_binding
