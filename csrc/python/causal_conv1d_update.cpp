#include "ops/causal_conv1d_update/causal_conv1d_update.h"

#include "python/checks.h"
#include "python/tensor.h"

namespace effinfer::causal_conv1d_update_binding {

constexpr auto kOp = "causal_conv1d_update";

// (B,D) seen as (B,D,1).
Tensor want_columns(const char* arg, py::handle object, uint32_t types) {
  Tensor t = want(kOp, arg, object, types);
  if (t.ndim == 2) {
    t.shape[2] = 1;
    t.ndim = 3;
  }
  if (t.ndim != 3) reject(kOp, arg, "have shape (B, D) or (B, D, L)", shape_text(t));
  return t;
}

void run(py::handle x_, py::handle state_, py::handle weight_, py::handle bias_, bool silu,
         int64_t dilation, py::handle indices_, py::handle y_) {
  const Tensor x = want_columns("x", x_, kFloats);
  const int64_t batch = x.shape[0], dim = x.shape[1], length = x.shape[2];
  const Tensor state = want(kOp, "conv_state", state_, kFloats, {kAny, dim, kAny});
  want_writable(kOp, "conv_state", state);
  const Tensor weight = want_dense(kOp, "weight", weight_, kF32, {dim, kAny});
  const Tensor bias = want_dense(kOp, "bias", bias_, kF32, {dim});
  const int64_t width = weight.shape[1];
  if (width < 1) reject(kOp, "weight", "have at least one column", shape_text(weight));
  if (dilation < 1) reject(kOp, "dilation", "be 1 or more", std::to_string(dilation));
  if (width > 1 && dilation > state.shape[2] / (width - 1))  // without overflow
    reject(kOp, "conv_state",
           "have at least " + std::to_string(width - 1) + " * " + std::to_string(dilation) +
               " columns",
           shape_text(state));
  const Tensor slots = want_slots(kOp, "state_indices", indices_, batch, state.shape[0]);
  if (!slots && state.shape[0] != batch)
    reject(kOp, "conv_state", "have one slot per row without state_indices", shape_text(state));
  const Tensor y = want_columns("y", y_, x.type);
  if (y.shape[0] != batch || y.shape[1] != dim || y.shape[2] != length)
    reject(kOp, "y", "have x's shape " + shape_text(x), shape_text(y));
  const CausalConv1dUpdate args = {
      .x = x.data,
      .state = state.data,
      .weight = weight.as<const float>(),
      .bias = bias.as<const float>(),
      .slots = slots.as<const int32_t>(),
      .y = y.data,
      .batch = batch,
      .dim = dim,
      .length = length,
      .width = width,
      .dilation = dilation,
      .columns = state.shape[2],
      .pool = state.shape[0],
      .x_batch = x.stride[0],
      .x_dim = x.stride[1],
      .x_time = x.stride[2],
      .y_batch = y.stride[0],
      .y_dim = y.stride[1],
      .y_time = y.stride[2],
      .state_slot = state.stride[0],
      .state_dim = state.stride[1],
      .state_column = state.stride[2],
      .type = x.dtype(),
      .state_type = state.dtype(),
      .silu = silu,
  };
  RUN(causal_conv1d_update, args, x);
}

void bind(Module& m) { m.def<&run>("causal_conv1d_update"); }

}  // namespace effinfer::causal_conv1d_update_binding
