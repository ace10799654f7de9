#include "ops/gated_rms_norm/gated_rms_norm.h"
#include "ops/layer_norm/layer_norm.h"
#include "ops/rms_norm/rms_norm.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::expect_same;
using testing::Floats;
using testing::random_floats;

constexpr int64_t kRows = 3;

class ShimNorms : public ::testing::TestWithParam<int> {
 protected:
  const int64_t dim = GetParam();
  const Floats x = random_floats(kRows * dim, 1), other = random_floats(kRows * dim, 2);
  const Floats weight = random_floats(dim, 3), bias = random_floats(dim, 4);
  const std::vector<Floats> outputs = {Floats(kRows * dim), Floats(kRows* dim)};

  // What rms_norm and layer_norm have in common.
  template <class Args>
  Args with_residual(std::vector<Floats>& out) const {
    Args a = {};
    a.x = x.data();
    a.residual = other.data();
    a.weight = weight.data();
    a.y = out[0].data();
    a.residual_out = out[1].data();
    a.rows = kRows;
    a.dim = a.x_stride = a.residual_stride = a.y_stride = a.residual_out_stride = dim;
    a.eps = 1e-5f;
    return a;
  }
};

TEST_P(ShimNorms, RmsNormMatchesScalar) {
  expect_same(
      outputs, [&](auto& out) { rms_norm_scalar(with_residual<RmsNorm>(out), 0, kRows); },
      [&](auto& out) { return rms_norm_cuda(with_residual<RmsNorm>(out), nullptr); });
}

TEST_P(ShimNorms, LayerNormMatchesScalar) {
  const auto args = [&](auto& out) {
    LayerNorm a = with_residual<LayerNorm>(out);
    a.bias = bias.data();
    return a;
  };
  expect_same(
      outputs, [&](auto& out) { layer_norm_scalar(args(out), 0, kRows); },
      [&](auto& out) { return layer_norm_cuda(args(out), nullptr); });
}

TEST_P(ShimNorms, GatedRmsNormMatchesScalar) {
  for (const bool norm_first : {false, true}) {
    const auto args = [&](auto& out) {
      return GatedRmsNorm{.x = x.data(),
                          .z = other.data(),
                          .weight = weight.data(),
                          .y = out[0].data(),
                          .rows = kRows,
                          .dim = dim,
                          .group = dim % 2 == 0 ? dim / 2 : dim,
                          .x_stride = dim,
                          .z_stride = dim,
                          .y_stride = dim,
                          .type = DType::f32,
                          .eps = 1e-5f,
                          .norm_before_gate = norm_first};
    };
    expect_same(
        outputs, [&](auto& out) { gated_rms_norm_scalar(args(out), 0, kRows); },
        [&](auto& out) { return gated_rms_norm_cuda(args(out), nullptr); });
  }
}

INSTANTIATE_TEST_SUITE_P(Dims, ShimNorms, ::testing::Values(1, 31, 256, 700));

}  // namespace
}  // namespace effinfer
