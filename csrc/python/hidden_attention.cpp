#include "ops/hidden_attention/hidden_attention.h"

#include "python/scan.h"

namespace effinfer::hidden_attention_binding {

constexpr auto kOp = "hidden_attention";

void run(py::handle delta_, py::handle A, py::handle B, py::handle C, py::handle delta_bias,
         bool softplus, py::handle alpha) {
  const Tensor delta = want(kOp, "delta", delta_, kFloats, {kAny, kAny, kAny});
  const int64_t batch = delta.shape[0], dim = delta.shape[1], length = delta.shape[2];
  const int64_t state = want(kOp, "A", A, kF32, {dim, kAny}).shape[1];
  HiddenAttention args = {
      .delta = want_signal(kOp, "delta", delta_, delta),
      .A = want_dense(kOp, "A", A, kF32, {dim, state}).as<const float>(),
      .B = want_matrix(kOp, "B", B, delta, state),
      .C = want_matrix(kOp, "C", C, delta, state),
      .delta_bias = want_dense(kOp, "delta_bias", delta_bias, kF32, {dim}).as<const float>(),
      .alpha = want_dense(kOp, "alpha", alpha, kF32, {batch, dim, length, length}).as<float>(),
      .batch = batch,
      .dim = dim,
      .length = length,
      .state = state,
      .softplus = softplus,
      .scratch = nullptr,
  };
#if !defined(EFFINFER_CUDA_MODULE)
  args.scratch = workspace(static_cast<size_t>(hidden_attention_scratch(args)));
#endif
  RUN(hidden_attention, args, delta);
}

void bind(Module& m) { m.def<&run>("hidden_attention"); }

}  // namespace effinfer::hidden_attention_binding
