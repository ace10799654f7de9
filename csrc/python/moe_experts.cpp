#include "ops/moe_experts/moe_experts.h"

#include <string>

#include "base/parallel.h"
#include "ops/linear/linear.h"
#include "python/tensor.h"

namespace effinfer::moe_experts_binding {

constexpr auto kOp = "moe_experts";
constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh", "relu2"};

ExpertActivation activation_named(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kActivations[i]) return static_cast<ExpertActivation>(i);
  reject(kOp, "activation", "be a known one", "'" + name + "'");  // the Python layer lists them
}

Tensor want_packed(const char* arg, py::handle object, int64_t experts, int64_t outputs,
                   int64_t k) {
  constexpr int64_t kPanel = linear_layout::kPanel;
  const int64_t panels = outputs == kAny ? kAny : (outputs + kPanel - 1) / kPanel;
  return want_array(kOp, arg, object, kFloats, {experts, panels, k, kPanel});
}

void run(py::handle x_, py::handle index_, py::handle weights_, py::handle up_, py::handle down_,
         const std::string& activation, bool gated, py::handle y_) {
  const Rows x = want_rows(kOp, "x", x_, kFloats);
  MoeExperts args = {};
  args.rows = x.rows;
  args.dim = x.dim;
  args.gated = gated;
  args.activation = activation_named(activation);
  const Tensor index = want_array(kOp, "index", index_, kI32, {x.rows, kAny});
  args.top_k = index.shape[1];
  const Tensor weights = want_array(kOp, "weights", weights_, kF32, {x.rows, args.top_k});
  const Tensor down = want_packed("down", down_, kAny, x.dim, kAny);
  args.experts = down.shape[0];
  args.inner = down.shape[2];
  const Tensor up = want_packed("up", up_, args.experts, args.up_outputs(), x.dim);
  const Rows y = want_rows(kOp, "y", y_, x.tensor.type, x.rows, x.dim);
  args.x = x.tensor.data;
  args.index = index.as<const int32_t>();
  args.weights = weights.as<const float>();
  args.up = up.data;
  args.down = down.data;
  args.y = y.tensor.data;
  args.x_stride = x.stride;
  args.y_stride = y.stride;
  args.x_type = x.tensor.dtype();
  args.up_type = up.dtype();
  args.down_type = down.dtype();
#if defined(EFFINFER_CUDA_MODULE)
  const DeviceScratch scratch(x_, moe_experts_cuda_scratch(args));
  args.scratch.rows = scratch.data();
#else
  for (int64_t p = 0; p < args.rows * args.top_k; ++p)
    if (args.index[p] < 0 || args.index[p] >= args.experts)
      reject(kOp, "index", "be in [0, " + std::to_string(args.experts) + ")",
             std::to_string(args.index[p]));
  args.slots = num_threads();
  moe_experts_scratch(args, workspace(moe_experts_scratch(args, nullptr)));
#endif
  RUN(moe_experts, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("moe_experts"); }

}  // namespace effinfer::moe_experts_binding
