#include "ops/linear/linear.h"

#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::expect_same;
using testing::Floats;
using testing::random_floats;

// Few and many rows, with a tail of every size, and a gate.
TEST(ShimLinear, MatchesScalar) {
  constexpr int64_t kN = 37, kK = 70;
  for (const int64_t rows : {1, 9, 17, 70})
    for (const Epilogue epilogue : {Epilogue::none, Epilogue::silu_mul}) {
      Linear a = {};
      a.rows = rows;
      a.n = kN;
      a.k = kK;
      a.epilogue = epilogue;
      const int64_t panels = linear_layout::panels(a);
      const Floats x = random_floats(rows * kK, 1), bias = random_floats(2 * kN, 2),
                   residual = random_floats(rows * kN, 3),
                   weight = random_floats(panels * kK * linear_layout::kPanel, 4);
      a.x = x.data();
      a.weight = weight.data();
      a.bias = bias.data();
      a.residual = residual.data();
      a.x_stride = kK;
      a.residual_stride = a.y_stride = kN;
      const auto with_output = [&](auto& out) {
        Linear filled = a;
        filled.y = out[0].data();
        return filled;
      };
      expect_same(
          {Floats(rows * kN)},
          [&](auto& out) { linear_scalar(with_output(out), {0, rows, 0, panels, 1, nullptr}); },
          [&](auto& out) { return linear_cuda(with_output(out), nullptr); });
    }
}

}  // namespace
}  // namespace effinfer
