#include "ops/selective_scan_lmu/selective_scan_lmu.h"

#include "python/scan.h"

namespace effinfer::selective_scan_lmu_binding {

constexpr auto kOp = "selective_scan_lmu";

void run(py::handle u_, py::handle transition_, py::handle initial_state, py::handle memories_,
         py::handle last_state_, py::handle snapshots_) {
  const Tensor u = want(kOp, "u", u_, kFloats, {kAny, kAny, kAny});
  const int64_t batch = u.shape[0], dim = u.shape[1], length = u.shape[2];
  const Tensor last = want_dense(kOp, "last_state", last_state_, kF32, {batch, dim, kAny});
  const int64_t state = last.shape[2], panels = (state + kLmuPanel - 1) / kLmuPanel;
  const Tensor transition =
      want_dense(kOp, "transition", transition_, kF32, {panels, kAny, kLmuPanel});
  const int64_t chunk = transition.shape[1] - state;
  if (chunk < 1 || length % chunk != 0)
    reject(kOp, "transition", "take a number of inputs that divides " + std::to_string(length),
           std::to_string(chunk));
  const Tensor memories = want_dense(kOp, "m", memories_, u.type, {batch, dim, kAny, state});
  const Tensor saved = want_dense(kOp, "snapshots", snapshots_, kF32, {batch, kAny, dim, state});
  const bool keep = memories.shape[2] > 0;
  if (keep && (memories.shape[2] != length || chunk != 1))
    reject(kOp, "m", "hold no memories, or all and one for each step", shape_text(memories));
  if (saved.shape[1] > 0 && chunk != 1)
    reject(kOp, "snapshots", "be none where a step takes several inputs", shape_text(saved));
  SelectiveScanLmu args = {
      .u = want_signal(kOp, "u", u_, u),
      .transition = transition.as<const float>(),
      .initial_state = want_dense(kOp, "initial_state", initial_state, kF32, {batch, dim, state})
                           .as<const float>(),
      .memories = keep ? memories.data : nullptr,
      .last_state = last.as<float>(),
      .snapshots = saved.as<float>(),
      .batch = batch,
      .dim = dim,
      .length = length,
      .state = state,
      .chunk = chunk,
      .num_snapshots = saved.shape[1],
      .scratch = nullptr,
  };
#if !defined(EFFINFER_CUDA_MODULE)
  args.scratch = workspace(static_cast<size_t>(selective_scan_lmu_scratch(args)));
#endif
  RUN(selective_scan_lmu, args, u);
}

void bind(Module& m) { m.def<&run>("selective_scan_lmu"); }

}  // namespace effinfer::selective_scan_lmu_binding
