#include "ops/rms_norm/rms_norm.h"

#include <string>

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
      .index = nullptr,
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

// Without a residual, and with the row's own line of `weight (lines, dim)`.
void run_by_row(py::handle x_, py::handle weight_, py::handle index_, double eps, py::handle y_) {
  constexpr auto op = "rms_norm_by_row";
  const Rows x = want_rows(op, "x", x_, kFloats);
  const Rows y = want_rows(op, "y", y_, x.tensor.type, x.rows, x.dim);
  const Tensor weight = want_array(op, "weight", weight_, kF32, {kAny, x.dim});
  const Tensor index = want_array(op, "index", index_, kI32, {x.rows});
  RmsNorm args = {};
  args.x = x.tensor.data;
  args.weight = weight.as<const float>();
  args.index = index.as<const int32_t>();
  args.y = y.tensor.data;
  args.rows = x.rows;
  args.dim = x.dim;
  args.x_stride = x.stride;
  args.y_stride = y.stride;
  args.x_type = args.residual_type = args.residual_out_type = x.tensor.dtype();
  args.eps = static_cast<float>(eps);
#if !defined(EFFINFER_CUDA_MODULE)
  for (int64_t row = 0; row < args.rows; ++row)
    if (args.index[row] < 0 || args.index[row] >= weight.shape[0])
      reject(op, "index", "be in [0, " + std::to_string(weight.shape[0]) + ")",
             std::to_string(args.index[row]));
#endif
  RUN(rms_norm, args, x.tensor);
}

void bind(Module& m) {
  m.def<&run>("rms_norm");
  m.def<&run_by_row>("rms_norm_by_row");
}

}  // namespace effinfer::rms_norm_binding
