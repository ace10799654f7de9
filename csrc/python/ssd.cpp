#include "ops/ssd/ssd.h"

#include <algorithm>

#include "base/parallel.h"
#include "python/checks.h"
#include "python/tensor.h"

namespace effinfer::ssd_binding {

constexpr auto kOp = "ssd";

template <size_t N>
void copy_strides(const Tensor& t, int64_t (&strides)[N]) {
  std::copy_n(t.stride, t ? N : 0, strides);
}

void run(py::handle x_, py::handle dt_, py::handle A_, py::handle B_, py::handle C_, py::handle D_,
         py::handle z_, py::handle dt_bias_, py::handle initial_state_, py::handle seq_idx_,
         py::handle cu_seqlens_, py::handle mask_, bool dt_softplus, double dt_min, double dt_max,
         bool one_by_one, py::handle y_, py::handle last_state_, py::handle snapshots_) {
  const Tensor x = want(kOp, "x", x_, kFloats, {kAny, kAny, kAny, kAny});
  const int64_t batch = x.shape[0], length = x.shape[1], heads = x.shape[2], P = x.shape[3];
  const Tensor dt = want(kOp, "dt", dt_, kFloats, {batch, length, heads});
  const Tensor A = want(kOp, "A", A_, kF32, {heads});
  const Tensor B = want(kOp, "B", B_, kFloats, {batch, length, kAny, kAny});
  const int64_t groups = B.shape[2], N = B.shape[3];
  if (groups < 1 || heads % groups != 0)
    reject(kOp, "B", "have a number of groups that divides " + std::to_string(heads) + " heads",
           std::to_string(groups));
  const Tensor C = want(kOp, "C", C_, B.type, {batch, length, groups, N});
  const bool per_channel = !D_.is_none() && want(kOp, "D", D_, kF32).ndim == 2;
  const Tensor D = per_channel ? want(kOp, "D", D_, kF32, {heads, P})
                               : want_optional(kOp, "D", D_, kF32, {heads});
  const Tensor z = want_optional(kOp, "z", z_, x.type, {batch, length, heads, P});
  const Tensor bias = want_optional(kOp, "dt_bias", dt_bias_, kF32, {heads});
  const Tensor seq_idx = want_optional(kOp, "seq_idx", seq_idx_, kI32, {batch, length});
  const Tensor mask = want_optional(kOp, "mask", mask_, kBool8, {batch, length});
  const Tensor cu_seqlens = want_cu_seqlens(kOp, cu_seqlens_, length);
  if (cu_seqlens && batch != 1)
    reject(kOp, "x", "have batch size 1 when cu_seqlens is given", std::to_string(batch));
  if (cu_seqlens && seq_idx) reject(kOp, "seq_idx", "be None when cu_seqlens is given", "both");
  if (!(dt_min <= dt_max))
    reject(kOp, "dt_limit", "be a pair (low, high) with low <= high",
           "(" + std::to_string(dt_min) + ", " + std::to_string(dt_max) + ")");
  const int64_t sequences = cu_seqlens ? cu_seqlens.shape[0] - 1 : batch;
  const Tensor initial =
      want_optional(kOp, "initial_state", initial_state_, kF32, {sequences, heads, P, N});
  if (initial && !initial.is_contiguous())
    reject(kOp, "initial_state", "be contiguous", "a strided view");
  const Tensor y = want(kOp, "y", y_, x.type, {batch, length, heads, P});
  const Tensor last = want(kOp, "last_state", last_state_, kF32, {sequences, heads, P, N});
  const Tensor snapshots =
      want_optional(kOp, "snapshots", snapshots_, kF32, {sequences, kAny, heads, P, N});
  Ssd args = {
      .x = x.data,
      .dt = dt.data,
      .A = A.as<const float>(),
      .B = B.data,
      .C = C.data,
      .D = D.as<const float>(),
      .z = z.data,
      .dt_bias = bias.as<const float>(),
      .initial_state = initial.as<const float>(),
      .cu_seqlens = cu_seqlens.as<const int32_t>(),
      .seq_idx = seq_idx.as<const int32_t>(),
      .mask = mask.as<const uint8_t>(),
      .y = y.data,
      .last_state = last.as<float>(),
      .snapshots = snapshots.as<float>(),
      .batch = batch,
      .length = length,
      .heads = heads,
      .head_dim = P,
      .groups = groups,
      .state_dim = N,
      .sequences = sequences,
      .snapshot_count = snapshots ? snapshots.shape[1] : 0,
      .D_strides = {D ? D.stride[0] : 0, per_channel ? D.stride[1] : 0},
      .A_stride = A.stride[0],
      .dt_bias_stride = bias ? bias.stride[0] : 0,
      .x_type = x.dtype(),
      .dt_type = dt.dtype(),
      .B_type = B.dtype(),
      .dt_min = static_cast<float>(dt_min),
      .dt_max = static_cast<float>(dt_max),
      .dt_softplus = dt_softplus,
      .one_by_one = one_by_one,
      .slots = num_threads(),
  };
  copy_strides(x, args.x_strides);
  copy_strides(z, args.z_strides);
  copy_strides(y, args.y_strides);
  copy_strides(dt, args.dt_strides);
  copy_strides(B, args.B_strides);
  copy_strides(C, args.C_strides);
  copy_strides(seq_idx, args.seq_idx_strides);
  copy_strides(mask, args.mask_strides);
#if !defined(EFFINFER_CUDA_MODULE)
  args.scratch =
      static_cast<float*>(workspace(static_cast<size_t>(ssd_scratch(args)) * sizeof(float)));
#endif
  RUN(ssd, args, x);
}

void bind(Module& m) {
  m.def<&run>("ssd");
  m.attr("ssd_chunk") = kSsdChunk;
}

}  // namespace effinfer::ssd_binding
