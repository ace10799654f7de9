#include "ops/causal_conv1d/causal_conv1d.h"

#include "python/checks.h"
#include "python/tensor.h"

namespace effinfer::causal_conv1d_binding {

constexpr auto kOp = "causal_conv1d";

void run(py::handle x_, py::handle weight_, py::handle bias_, bool silu, py::handle initial_,
         int64_t dilation, py::handle cu_seqlens_, py::handle mask_, int64_t num_states,
         py::handle y_, py::handle states_) {
  const Tensor x = want(kOp, "x", x_, kFloats, {kAny, kAny, kAny});
  const int64_t batch = x.shape[0], dim = x.shape[1], length = x.shape[2];
  const Tensor weight = want_dense(kOp, "weight", weight_, kF32, {dim, kAny});
  const int64_t width = weight.shape[1];
  if (width < 1) reject(kOp, "weight", "have at least one column", shape_text(weight));
  if (dilation < 1) reject(kOp, "dilation", "be 1 or more", std::to_string(dilation));
  const Tensor bias = want_dense(kOp, "bias", bias_, kF32, {dim});
  const Tensor cu_seqlens = want_cu_seqlens(kOp, cu_seqlens_, length);
  if (cu_seqlens && batch != 1)
    reject(kOp, "x", "have a batch of 1 with cu_seqlens", shape_text(x));
  const int64_t sequences = cu_seqlens ? cu_seqlens.shape[0] - 1 : batch;
  const int64_t past = (width - 1) * dilation;
  const Tensor initial =
      want_optional(kOp, "initial_state", initial_, kF32, {sequences, dim, past});
  const Tensor mask = want_optional(kOp, "mask", mask_, kBool8, {batch, length});
  const Tensor y = want(kOp, "y", y_, x.type, {batch, dim, length});
  const Tensor states = want(kOp, "states", states_, kF32);
  if (!states.is_contiguous() || states.numel() != sequences * num_states * dim * past)
    reject(kOp, "states", "be dense and hold every state", shape_text(states));
  const CausalConv1d args = {
      .x = x.data,
      .weight = weight.as<const float>(),
      .bias = bias.as<const float>(),
      .initial_state = initial.as<const float>(),
      .cu_seqlens = cu_seqlens.as<const int32_t>(),
      .mask = mask.as<const uint8_t>(),
      .y = y.data,
      .states = states.as<float>(),
      .sequences = sequences,
      .dim = dim,
      .length = length,
      .width = width,
      .dilation = dilation,
      .num_states = num_states,
      .x_batch = x.stride[0],
      .x_dim = x.stride[1],
      .x_time = x.stride[2],
      .y_batch = y.stride[0],
      .y_dim = y.stride[1],
      .y_time = y.stride[2],
      .initial_sequence = initial.stride[0],
      .initial_dim = initial.stride[1],
      .initial_column = initial.stride[2],
      .mask_batch = mask.stride[0],
      .mask_time = mask.stride[1],
      .type = x.dtype(),
      .silu = silu,
  };
  RUN(causal_conv1d, args, x);
}

void bind(Module& m) { m.def<&run>("causal_conv1d"); }

}  // namespace effinfer::causal_conv1d_binding
