#include "ops/ssd_state_update/ssd_state_update.h"

#include "python/checks.h"
#include "python/tensor.h"

namespace effinfer::ssd_state_update_binding {

constexpr auto kOp = "ssd_state_update";

void run(py::handle state_, py::handle x_, py::handle dt_, py::handle A_, py::handle B_,
         py::handle C_, py::handle D_, py::handle z_, py::handle dt_bias_, bool dt_softplus,
         double dt_min, double dt_max, py::handle state_indices_, py::handle y_) {
  const Tensor state = want(kOp, "state", state_, kF32, {kAny, kAny, kAny, kAny});
  const int64_t slots = state.shape[0], heads = state.shape[1], P = state.shape[2],
                N = state.shape[3];
  want_writable(kOp, "state", state);
  const Tensor x = want(kOp, "x", x_, kFloats, {kAny, heads, P});
  const int64_t batch = x.shape[0];
  const Tensor indices = want_slots(kOp, "state_indices", state_indices_, batch, slots);
  if (!indices && batch != slots)
    reject(kOp, "state",
           "have one slot for each of " + std::to_string(batch) +
               " batch rows when state_indices is None",
           std::to_string(slots));
  // An argument given per head, or per head and channel: the missing dimensions have stride 0.
  const auto per_head = [&](const char* name, py::handle object, int wide) {
    if (object.is_none()) return Tensor{};
    const Tensor t = want(kOp, name, object, kF32);
    return t.ndim == 1 ? want(kOp, name, object, kF32, {heads})
           : wide == 2 ? want(kOp, name, object, kF32, {heads, P})
                       : want(kOp, name, object, kF32, {heads, P, N});
  };
  const bool dt_per_channel = want(kOp, "dt", dt_, kFloats).ndim == 3;
  const Tensor dt = dt_per_channel ? want(kOp, "dt", dt_, kFloats, {batch, heads, P})
                                   : want(kOp, "dt", dt_, kFloats, {batch, heads});
  want(kOp, "A", A_, kF32);  // not optional, as per_head() takes it
  const Tensor A = per_head("A", A_, 3);
  const Tensor B = want(kOp, "B", B_, kFloats, {batch, kAny, N});
  const int64_t groups = B.shape[1];
  if (groups < 1 || heads % groups != 0)
    reject(kOp, "B", "have a number of groups that divides " + std::to_string(heads) + " heads",
           std::to_string(groups));
  const Tensor C = want(kOp, "C", C_, B.type, {batch, groups, N});
  const Tensor D = per_head("D", D_, 2);
  const Tensor z = want_optional(kOp, "z", z_, x.type, {batch, heads, P});
  const Tensor bias = per_head("dt_bias", dt_bias_, 2);
  if (!(dt_min <= dt_max))
    reject(kOp, "dt_limit", "be a pair (low, high) with low <= high",
           "(" + std::to_string(dt_min) + ", " + std::to_string(dt_max) + ")");
  const Tensor y = want(kOp, "y", y_, x.type, {batch, heads, P});
  const SsdStateUpdate args = {
      .state = state.as<float>(),
      .x = x.data,
      .dt = dt.data,
      .A = A.as<const float>(),
      .B = B.data,
      .C = C.data,
      .D = D.as<const float>(),
      .z = z.data,
      .dt_bias = bias.as<const float>(),
      .state_indices = indices.as<const int32_t>(),
      .y = y.data,
      .batch = batch,
      .heads = heads,
      .head_dim = P,
      .groups = groups,
      .state_dim = N,
      .slots = slots,
      .state_strides = {state.stride[0], state.stride[1], state.stride[2], state.stride[3]},
      .x_strides = {x.stride[0], x.stride[1], x.stride[2]},
      .z_strides = {z.stride[0], z.stride[1], z.stride[2]},
      .y_strides = {y.stride[0], y.stride[1], y.stride[2]},
      .dt_strides = {dt.stride[0], dt.stride[1], dt.stride[2]},
      .A_strides = {A.stride[0], A.stride[1], A.stride[2]},
      .B_strides = {B.stride[0], B.stride[1], B.stride[2]},
      .C_strides = {C.stride[0], C.stride[1], C.stride[2]},
      .D_strides = {D.stride[0], D.stride[1]},
      .dt_bias_strides = {bias.stride[0], bias.stride[1]},
      .x_type = x.dtype(),
      .dt_type = dt.dtype(),
      .B_type = B.dtype(),
      .dt_min = static_cast<float>(dt_min),
      .dt_max = static_cast<float>(dt_max),
      .dt_softplus = dt_softplus,
  };
  RUN(ssd_state_update, args, x);
}

void bind(Module& m) { m.def<&run>("ssd_state_update"); }

}  // namespace effinfer::ssd_state_update_binding
