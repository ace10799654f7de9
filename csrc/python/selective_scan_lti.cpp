#include "ops/selective_scan_lti/selective_scan_lti.h"

#include "python/scan.h"

namespace effinfer::selective_scan_lti_binding {

constexpr auto kOp = "selective_scan_lti";

void run(py::handle u_, py::handle A_, py::handle B, py::handle C, py::handle D,
         py::handle initial_state, py::handle cu_seqlens, py::handle mask_, bool reverse,
         py::handle y, py::handle last_state, py::handle snapshots) {
  const Tensor u = want(kOp, "u", u_, kFloats, {kAny, kAny, kAny});
  const int64_t batch = u.shape[0], dim = u.shape[1], length = u.shape[2];
  const Tensor A = want_dense(kOp, "A_bar", A_, kF32 | kC64, {dim, kAny});
  const int64_t state = A.shape[1];
  const Tensor starts = want_cu_seqlens(kOp, cu_seqlens, length);
  if (starts && batch != 1)
    reject(kOp, "u", "have batch size 1 when cu_seqlens is given", std::to_string(batch));
  const int64_t sequences = starts ? starts.shape[0] - 1 : batch;
  const Tensor mask = want_optional(kOp, "mask", mask_, kBool8, {batch, length});
  // Coefficients and states are all of A's type, float32 or complex64.
  const auto numbers = [&](const char* arg, py::handle object,
                           std::initializer_list<int64_t> shape) {
    return want_dense(kOp, arg, object, A.type, shape);
  };
  const Tensor saved = numbers("snapshots", snapshots, {sequences, kAny, dim, state});
  SelectiveScanLti args = {
      .u = want_signal(kOp, "u", u_, u),
      .y = want_signal(kOp, "y", y, u),
      .A = A.as<const float>(),
      .B = numbers("B_bar", B, {dim, state}).as<const float>(),
      .C = numbers("C", C, {dim, state}).as<const float>(),
      .D = want_dense(kOp, "D", D, kF32, {dim}).as<const float>(),
      .initial_state =
          numbers("initial_state", initial_state, {sequences, dim, state}).as<const float>(),
      .cu_seqlens = starts.as<const int32_t>(),
      .mask = mask.as<const uint8_t>(),
      .mask_batch = mask.stride[0],
      .mask_time = mask.stride[1],
      .last_state = numbers("last_state", last_state, {sequences, dim, state}).as<float>(),
      .snapshots = saved.as<float>(),
      .batch = batch,
      .dim = dim,
      .length = length,
      .state = state,
      .sequences = sequences,
      .num_snapshots = saved.shape[1],
      .complex = A.type == kC64,
      .reverse = reverse,
      .scratch = nullptr,
  };
#if !defined(EFFINFER_CUDA_MODULE)
  args.scratch = workspace(static_cast<size_t>(selective_scan_lti_scratch(args)));
#endif
  RUN(selective_scan_lti, args, u);
}

void bind(Module& m) { m.def<&run>("selective_scan_lti"); }

}  // namespace effinfer::selective_scan_lti_binding
