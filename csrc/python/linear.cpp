#include "ops/linear/linear.h"

#include <string>

#include "base/parallel.h"
#include "python/epilogue.h"
#include "python/tensor.h"

namespace effinfer::linear_binding {

constexpr auto kOp = "linear";

void run(py::handle x_, py::handle packed_, int64_t out_features, py::handle bias_,
         const std::string& epilogue, py::handle residual_, py::handle y_) {
  using linear_layout::kPanel;
  const Rows x = want_rows(kOp, "x", x_, kFloats);
  Linear args = {};
  args.n = out_features;
  args.epilogue = epilogue_named(kOp, epilogue);
  if (args.n < 0) reject(kOp, "out_features", "be 0 or more", std::to_string(args.n));
  const Tensor packed =
      want(kOp, "packed", packed_, kFloats, {linear_layout::panels(args), x.dim, kPanel});
  if (!packed.is_contiguous()) reject(kOp, "packed", "be contiguous", "a strided view");
  const Tensor bias = takes_two(args.epilogue)
                          ? want_optional(kOp, "bias", bias_, kF32, {2, args.n})
                          : want_optional(kOp, "bias", bias_, kF32, {args.n});
  if (bias && !bias.is_contiguous()) reject(kOp, "bias", "be contiguous", "a strided view");
  const Rows residual = want_rows(kOp, "residual", residual_, x.tensor.type, x.rows, args.n, true);
  const Rows y = want_rows(kOp, "y", y_, x.tensor.type, x.rows, args.n);
  args.x = x.tensor.data;
  args.weight = packed.data;
  args.bias = bias.as<const float>();
  args.residual = residual.tensor.data;
  args.y = y.tensor.data;
  args.rows = x.rows;
  args.k = x.dim;
  args.x_stride = x.stride;
  args.residual_stride = residual.stride;
  args.y_stride = y.stride;
  args.x_type = x.tensor.dtype();
  args.weight_type = packed.dtype();
#if !defined(EFFINFER_CUDA_MODULE)
  args.slots = num_threads();
  args.scratch = static_cast<float*>(workspace(linear_scratch(args)));
#endif
  RUN(linear, args, x.tensor);
}

void advise(py::handle tensor) {
  const Tensor t = want("advise_huge_pages", "packed", tensor, kFloats | kU8);
  advise_huge_pages(t.data, static_cast<size_t>(t.numel() * t.element_size));
}

void bind(Module& m) {
  m.def<&run>("linear");
  m.def<&advise>("advise_huge_pages");
}

}  // namespace effinfer::linear_binding
