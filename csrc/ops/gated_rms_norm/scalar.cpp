// The definition, one element at a time.
#include "base/scalar.h"

#include "ops/gated_rms_norm/gated_rms_norm.h"

namespace effinfer {
namespace {

template <class T>
void normalise_rows(const GatedRmsNorm& a, int64_t begin, int64_t end) {
  using scalar::get;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* z = static_cast<const T*>(a.z) + row * a.z_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    const auto gate = [&](int64_t i) { return a.z != nullptr ? scalar::silu(get(z + i)) : 1.f; };
    const auto value = [&](int64_t i) {
      return a.norm_before_gate ? get(x + i) : get(x + i) * gate(i);
    };
    for (int64_t first = 0; first < a.dim; first += a.group) {
      double squares = 0;
      for (int64_t i = first; i < first + a.group; ++i) squares += double{value(i)} * value(i);
      const float mean = static_cast<float>(squares / static_cast<double>(a.group));
      const float scale = 1.f / std::sqrt(mean + a.eps);
      for (int64_t i = first; i < first + a.group; ++i) {
        const float w = a.weight != nullptr ? a.weight[i] : 1.f;
        const float normed = value(i) * scale * w;
        scalar::put(y + i, a.norm_before_gate ? normed * gate(i) : normed);
      }
    }
  }
}

}  // namespace

void gated_rms_norm_scalar(const GatedRmsNorm& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) { normalise_rows<decltype(x)>(a, begin, end); });
}

}  // namespace effinfer
