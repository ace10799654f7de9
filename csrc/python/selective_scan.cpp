#include "ops/selective_scan/selective_scan.h"

#include "python/scan.h"

namespace effinfer::selective_scan_binding {

constexpr auto kOp = "selective_scan";

const float* dense(const char* arg, py::handle object, std::initializer_list<int64_t> shape) {
  const Tensor t = want_optional(kOp, arg, object, kF32, shape);
  if (t && !t.is_contiguous()) reject(kOp, arg, "be contiguous", "a strided view");
  return t.as<const float>();
}

void run(py::handle u_, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D,
         py::handle z, py::handle delta_bias, bool softplus, py::handle initial_state,
         py::handle cu_seqlens, py::handle mask_, bool reverse, py::handle y, py::handle last_state,
         py::handle snapshots) {
  const Tensor u = want(kOp, "u", u_, kFloats, {kAny, kAny, kAny});
  const int64_t batch = u.shape[0], dim = u.shape[1], length = u.shape[2];
  const int64_t state = want(kOp, "A", A, kF32, {dim, kAny}).shape[1];
  const Tensor starts = want_cu_seqlens(kOp, cu_seqlens, length);
  if (starts && batch != 1)
    reject(kOp, "u", "have batch size 1 when cu_seqlens is given", std::to_string(batch));
  const int64_t sequences = starts ? starts.shape[0] - 1 : batch;
  const Tensor mask = want_optional(kOp, "mask", mask_, kBool8, {batch, length});
  const Tensor saved = want(kOp, "snapshots", snapshots, kF32, {sequences, kAny, dim, state});
  SelectiveScan args = {
      .u = {u.data, u.stride[0], u.stride[1], u.stride[2], u.dtype()},
      .delta = want_signal(kOp, "delta", delta, u),
      .z = z.is_none() ? ScanSignal{} : want_signal(kOp, "z", z, u),
      .y = want_signal(kOp, "y", y, u),
      .A = dense("A", A, {dim, state}),
      .B = want_matrix(kOp, "B", B, u, state),
      .C = want_matrix(kOp, "C", C, u, state),
      .D = dense("D", D, {dim}),
      .delta_bias = dense("delta_bias", delta_bias, {dim}),
      .initial_state = dense("initial_state", initial_state, {sequences, dim, state}),
      .cu_seqlens = starts.as<const int32_t>(),
      .mask = mask.as<const uint8_t>(),
      .mask_batch = mask.stride[0],
      .mask_time = mask.stride[1],
      .last_state = const_cast<float*>(dense("last_state", last_state, {sequences, dim, state})),
      .snapshots = saved.as<float>(),
      .batch = batch,
      .dim = dim,
      .length = length,
      .state = state,
      .sequences = sequences,
      .num_snapshots = saved.shape[1],
      .softplus = softplus,
      .reverse = reverse,
      .scratch = nullptr,
  };
  if (!args.B.constant && !args.C.constant && args.B.groups != args.C.groups &&
      args.B.groups != 1 && args.C.groups != 1)
    reject(kOp, "C", "have 1 or " + std::to_string(args.B.groups) + " groups, as B",
           std::to_string(args.C.groups));
#if defined(EFFINFER_CUDA_MODULE)
  const DeviceScratch scratch(u_, selective_scan_cuda_scratch(args));
  args.scratch = scratch.data();
#else
  args.scratch = workspace(static_cast<size_t>(selective_scan_scratch(args)));
#endif
  RUN(selective_scan, args, u);
}

void bind(Module& m) { m.def<&run>("selective_scan"); }

}  // namespace effinfer::selective_scan_binding
