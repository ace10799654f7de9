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

// Which rows of y exit: those whose larger probability, or whose margin, exceeds the threshold.
// Gives whether all of y are numbers. For the engine, whose arrays are in the CPU's memory.
bool exits(py::handle y_, py::handle exits_, double threshold, bool by_margin) {
  constexpr auto op = "top2_exits";
  const Tensor y = want_array(op, "y", y_, kF32, {kAny, 2});
  const Tensor exits = want_array(op, "exits", exits_, kU8, {y.shape[0]});
  const float* const probabilities = y.as<float>();
  bool sound = true;
  for (int64_t i = 0; i < y.shape[0]; ++i) {
    const float first = probabilities[2 * i], second = probabilities[2 * i + 1];
    exits.as<uint8_t>()[i] = double{by_margin ? first - second : first} > threshold;
    sound &= first == first;
  }
  return sound;
}

void bind(Module& m) {
  m.def<&run>("softmax_top2");
#if !defined(EFFINFER_CUDA_MODULE)
  m.def<&exits>("top2_exits");
#endif
}

}  // namespace effinfer::softmax_top2_binding
