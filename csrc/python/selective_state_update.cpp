#include "ops/selective_state_update/selective_state_update.h"

#include "python/checks.h"

namespace effinfer::selective_state_update_binding {

constexpr auto kOp = "selective_state_update";

StepSignal signal(const char* arg, py::handle object, int64_t batch, int64_t dim,
                  bool optional = false) {
  if (optional && object.is_none()) return {};
  const Tensor t = want(kOp, arg, object, kFloats, {batch, dim});
  return {t.data, t.stride[0], t.stride[1], t.dtype()};
}

// (B,N) or (B,G,N).
StepMatrix matrix(const char* arg, py::handle object, int64_t batch, int64_t state,
                  int64_t* groups) {
  const Tensor t = want(kOp, arg, object, kFloats);
  *groups = t.ndim == 3 ? t.shape[1] : 1;
  if (t.shape[0] == batch && t.shape[t.ndim - 1] == state) {
    if (t.ndim == 2) return {t.data, t.stride[0], 0, t.stride[1], t.dtype()};
    if (t.ndim == 3) return {t.data, t.stride[0], t.stride[1], t.stride[2], t.dtype()};
  }
  const std::string b = std::to_string(batch), n = std::to_string(state);
  reject(kOp, arg, "have shape (" + b + ", " + n + ") or (" + b + ", G, " + n + ")", shape_text(t));
}

const float* dense(const char* arg, py::handle object, std::initializer_list<int64_t> shape) {
  const Tensor t = want_optional(kOp, arg, object, kF32, shape);
  if (t && !t.is_contiguous()) reject(kOp, arg, "be contiguous", "a strided view");
  return t.as<const float>();
}

void run(py::handle state_, py::handle x_, py::handle dt, py::handle A, py::handle B, py::handle C,
         py::handle D, py::handle z, py::handle dt_bias, bool softplus, py::handle indices_,
         py::handle y) {
  const Tensor state = want(kOp, "state", state_, kF32, {kAny, kAny, kAny});
  want_writable(kOp, "state", state);
  const int64_t slots = state.shape[0], dim = state.shape[1], n = state.shape[2];
  const Tensor x = want(kOp, "x", x_, kFloats, {indices_.is_none() ? slots : kAny, dim});
  const int64_t batch = x.shape[0];
  const Tensor indices = want_slots(kOp, "state_indices", indices_, batch, slots);
  want(kOp, "A", A, kF32, {dim, n});  // not optional, as dense() takes it
  int64_t groups = 0, c_groups = 0;
  const SelectiveStateUpdate args = {
      .state = state.as<float>(),
      .state_slot = state.stride[0],
      .state_channel = state.stride[1],
      .state_n = state.stride[2],
      .x = {x.data, x.stride[0], x.stride[1], x.dtype()},
      .dt = signal("dt", dt, batch, dim),
      .z = signal("z", z, batch, dim, true),
      .y = signal("y", y, batch, dim),
      .A = dense("A", A, {dim, n}),
      .B = matrix("B", B, batch, n, &groups),
      .C = matrix("C", C, batch, n, &c_groups),
      .D = dense("D", D, {dim}),
      .dt_bias = dense("dt_bias", dt_bias, {dim}),
      .state_indices = indices.as<const int32_t>(),
      .batch = batch,
      .dim = dim,
      .state_size = n,
      .groups = groups,
      .slots = slots,
      .softplus = softplus,
  };
  if (groups < 1 || dim % groups != 0)
    reject(kOp, "B", "have a number of groups that divides " + std::to_string(dim),
           std::to_string(groups));
  if (c_groups != groups)
    reject(kOp, "C", "have as many groups as B, " + std::to_string(groups),
           std::to_string(c_groups));
  RUN(selective_state_update, args, x);
}

void bind(Module& m) { m.def<&run>("selective_state_update"); }

}  // namespace effinfer::selective_state_update_binding
