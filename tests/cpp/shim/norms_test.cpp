#include "ops/rms_norm/rms_norm.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::Floats;

TEST(ShimNorms, RmsNormMatchesScalar) {
  for (const int64_t dim : {1, 31, 256, 700}) {
    const int64_t rows = 3;
    const Floats x = testing::random_floats(rows * dim, 1),
                 r = testing::random_floats(rows * dim, 2), w = testing::random_floats(dim, 3);
    const auto args = [&](std::vector<Floats>& out) {
      return RmsNorm{.x = x.data(),
                     .residual = r.data(),
                     .weight = w.data(),
                     .y = out[0].data(),
                     .residual_out = out[1].data(),
                     .rows = rows,
                     .dim = dim,
                     .x_stride = dim,
                     .residual_stride = dim,
                     .y_stride = dim,
                     .residual_out_stride = dim,
                     .x_type = DType::f32,
                     .residual_type = DType::f32,
                     .residual_out_type = DType::f32,
                     .eps = 1e-5f,
                     .unit_offset = true};
    };
    testing::expect_same(
        {Floats(rows * dim), Floats(rows * dim)},
        [&](auto& out) { rms_norm_scalar(args(out), 0, rows); },
        [&](auto& out) { return rms_norm_cuda(args(out), nullptr); });
  }
}

}  // namespace
}  // namespace effinfer
