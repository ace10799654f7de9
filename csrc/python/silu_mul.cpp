#include "ops/silu_mul/silu_mul.h"

#include "python/tensor.h"

namespace effinfer::silu_mul_binding {

void run(py::handle gate_, py::handle up_, py::handle y_) {
  constexpr auto op = "silu_mul";
  const Rows gate = want_rows(op, "gate", gate_, kFloats);
  const Rows up = want_rows(op, "up", up_, gate.tensor.type, gate.rows, gate.dim);
  const Rows y = want_rows(op, "y", y_, gate.tensor.type, gate.rows, gate.dim);
  const SiluMul args = {
      .gate = gate.tensor.data,
      .up = up.tensor.data,
      .y = y.tensor.data,
      .rows = gate.rows,
      .dim = gate.dim,
      .gate_stride = gate.stride,
      .up_stride = up.stride,
      .y_stride = y.stride,
      .type = gate.tensor.dtype(),
  };
  RUN(silu_mul, args, gate.tensor);
}

void bind(Module& m) { m.def<&run>("silu_mul"); }

}  // namespace effinfer::silu_mul_binding
