#include "ops/low_rank_add/low_rank_add.h"

#include <string>

#include "python/tensor.h"

namespace effinfer::low_rank_add_binding {

constexpr auto kOp = "low_rank_add";

// (outputs, rank) of one part after the other, into args.
void take_parts(LowRankAdd& args, py::handle parts_) {
  const auto numbers = py::reinterpret_borrow<py::sequence>(parts_);
  const size_t count = py::len(numbers);
  if (count == 0 || count % 2 != 0 || count > 2 * LowRankAdd::kMaxParts)
    reject(kOp, "parts", "be 1 to 4 pairs of outputs and rank", std::to_string(count) + " numbers");
  args.part_count = static_cast<int>(count / 2);
  for (int p = 0; p < args.part_count; ++p) {
    auto& part = args.parts[p];
    part = {numbers[2 * p].cast<int64_t>(), numbers[2 * p + 1].cast<int64_t>()};
    if (part.outputs < 0 || part.rank < 0)
      reject(kOp, "parts", "hold no negative numbers",
             std::to_string(part.outputs) + ", " + std::to_string(part.rank));
    args.n += part.outputs;
    args.rank += part.rank;
    args.up_size += part.panels() * LowRankAdd::kPanel * part.rank;
  }
}

Rows want_matrix(const char* arg, py::handle object, uint32_t types, int64_t rows, int64_t dim) {
  const Rows r = want_rows(kOp, arg, object, types, rows, dim);
  if (r.tensor.ndim != 2) reject(kOp, arg, "have 2 dimensions", shape_text(r.tensor));
  return r;
}

void run(py::handle x_, py::handle index_, py::handle down_, py::handle up_, py::handle bias_,
         py::handle parts_, py::handle y_) {
  const Rows x = want_matrix("x", x_, kFloats, kAny, kAny);
  LowRankAdd args = {};
  take_parts(args, parts_);
  const Tensor index = want_array(kOp, "index", index_, kI32, {x.rows});
  const Tensor down = want_array(kOp, "down", down_, kFloats, {kAny, args.rank, x.dim});
  const int64_t groups = down.shape[0];
  const Tensor up = want_array(kOp, "up", up_, down.type, {groups, args.up_size});
  const Tensor bias = want_optional(kOp, "bias", bias_, kF32, {groups, args.n});
  if (bias && !bias.is_contiguous()) reject(kOp, "bias", "be contiguous", "a strided view");
  const Rows y = want_matrix("y", y_, x.tensor.type, x.rows, args.n);
  want_writable(kOp, "y", y.tensor);
  args.x = x.tensor.data;
  args.index = index.as<const int32_t>();
  args.down = down.data;
  args.up = up.data;
  args.bias = bias.as<const float>();
  args.y = y.tensor.data;
  args.rows = x.rows;
  args.k = x.dim;
  args.x_stride = x.stride;
  args.y_stride = y.stride;
  args.x_type = x.tensor.dtype();
  args.weight_type = down.dtype();
#if !defined(EFFINFER_CUDA_MODULE)
  for (int64_t row = 0; row < args.rows; ++row)
    if (args.index[row] < 0 || args.index[row] >= groups)
      reject(kOp, "index", "be in [0, " + std::to_string(groups) + ")",
             std::to_string(args.index[row]));
  args.low =
      static_cast<float*>(workspace(static_cast<size_t>(args.rows * args.rank) * sizeof(float)));
#endif
  RUN(low_rank_add, args, x.tensor);
}

void bind(Module& m) { m.def<&run>("low_rank_add"); }

}  // namespace effinfer::low_rank_add_binding
