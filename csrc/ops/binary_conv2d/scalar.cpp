// The definition of the fixed epilogue, one element at a time.
#include <algorithm>

#include "ops/binary_conv2d/binary_conv2d.h"

namespace effinfer {

using namespace binary_layout;

void binary_conv2d_scalar(const FixedTask& t) {
  const auto clamped = [](int32_t v) { return std::clamp(v, -kFixedLimit, kFixedLimit); };
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t n = 0; n < t.outputs; ++n) {
      const int32_t dot = t.terms[r] - 2 * t.counts[(n / kPart * t.rows + r) * kPart + n % kPart];
      auto sum = (static_cast<uint32_t>(dot) << t.epilogue.gain_shift[n]) +
                 static_cast<uint32_t>(t.epilogue.pre_bias[n]);
      if (t.residual != nullptr)
        sum += static_cast<uint32_t>(clamped(t.residual[r * t.y_stride + n]));
      auto a = static_cast<int32_t>(sum);
      if (a < 0) a >>= t.epilogue.slope_shift[n];
      t.y[r * t.y_stride + n] = clamped(a + t.epilogue.post_bias[n]);
    }
  }
}

}  // namespace effinfer
