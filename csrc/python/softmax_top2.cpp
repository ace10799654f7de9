#include "ops/softmax_top2/softmax_top2.h"

#include "python/tensor.h"

namespace effinfer::softmax_top2_binding {

void run(py::handle logits_, py::handle y_) {
  constexpr auto op = "softmax_top2";
  const Rows logits = want_rows(op, "logits", logits_, kFloats);
  if (logits.dim == 0 && logits.rows > 0) reject(op, "logits", "have at least one column", "none");
  const Tensor y = want_array(op, "y", y_, kF32, {logits.rows, 2});
  const SoftmaxTop2 args = {
      .x = logits.tensor.data,
      .y = y.as<float>(),
      .rows = logits.rows,
      .dim = logits.dim,
      .x_stride = logits.stride,
      .type = logits.tensor.dtype(),
  };
  RUN(softmax_top2, args, logits.tensor);
}

void bind(Module& m) { m.def<&run>("softmax_top2"); }

}  // namespace effinfer::softmax_top2_binding
