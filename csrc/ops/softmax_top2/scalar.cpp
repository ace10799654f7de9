// The definition, one element at a time.
#include "base/scalar.h"

#include <limits>

#include "ops/softmax_top2/softmax_top2.h"

namespace effinfer {

void softmax_top2_scalar(const SoftmaxTop2& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* const x = static_cast<const decltype(type)*>(a.x) + row * a.x_stride;
      float first = -std::numeric_limits<float>::infinity(), second = first;
      for (int64_t i = 0; i < a.dim; ++i) {
        const float value = scalar::get(x + i);
        if (value > first) {
          second = first;
          first = value;
        } else if (value > second) {
          second = value;
        }
      }
      double total = 0;
      for (int64_t i = 0; i < a.dim; ++i) total += std::exp(double{scalar::get(x + i)} - first);
      a.y[2 * row] = static_cast<float>(1 / total);
      a.y[2 * row + 1] = static_cast<float>(std::exp(double{second} - first) / total);
    }
  });
}

}  // namespace effinfer
