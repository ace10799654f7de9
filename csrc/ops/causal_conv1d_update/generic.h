// causal_conv1d_update over vec.h: channels in the lanes, one vector of them for every row, so that
// its weights are transposed once.
#include "base/vec.h"
#include "ops/causal_conv1d/lanes.h"
#include "ops/causal_conv1d_update/causal_conv1d_update.h"

namespace effinfer {
namespace {

constexpr int64_t kMaxKeptWidth = 8;  // taps whose weights stay in registers

// The states of up to kLanes channels of one slot.
template <class S>
struct States {
  S* at;
  int64_t dim, column, columns, n;

  EFFINFER_INLINE Vec get(int64_t c) const { return load_lanes(at + c * column, dim, n); }
  EFFINFER_INLINE void put(int64_t c, Vec x) const { store_lanes(at + c * column, dim, x, n); }

  // Every column takes the value of the next one; the newest is left for put().
  EFFINFER_INLINE void shift() const {
    if (column == 1 && dim == columns && n == kLanes) {  // one dense piece: shift it as a whole
      const int64_t last = columns * kLanes - kLanes;
      for (int64_t i = 0; i < last; i += kLanes) store(at + i, load(at + i + 1));
      store(at + last, load_n(at + last + 1, kLanes - 1));
    } else {
      for (int64_t c = 0; c + 1 < columns; ++c) put(c, get(c + 1));
    }
  }
};

template <class X, class S>
void update_channels(const CausalConv1dUpdate& a, int64_t d, int64_t n) {
  const int64_t width = a.width, dilation = a.dilation, columns = a.columns, length = a.length;
  const int64_t x_time = a.x_time, y_time = a.y_time, x_dim = a.x_dim, y_dim = a.y_dim;
  const bool silu_on = a.silu;
  const Vec bias = a.bias != nullptr ? load_lanes(a.bias + d, 1, n) : Vec{};
  Vec kept[kMaxKeptWidth];
  const auto weight = [&](int64_t j) { return load_lanes(a.weight + d * width + j, width, n); };
  for (int64_t j = 0; j < width && j < kMaxKeptWidth; ++j) kept[j] = weight(j);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t slot = a.slots != nullptr ? a.slots[b] : b;
    const X* x = static_cast<const X*>(a.x) + b * a.x_batch + d * x_dim;
    X* y = static_cast<X*>(a.y) + b * a.y_batch + d * y_dim;
    const States<S> states = {static_cast<S*>(a.state) + slot * a.state_slot + d * a.state_dim,
                              a.state_dim, a.state_column, columns, n};
    for (int64_t t = 0; t < length; ++t, x += x_time, y += y_time) {
      Vec result{};
      if (slot >= 0) {
        const Vec newest = load_lanes(x, x_dim, n);
        Vec sum = bias;
        for (int64_t j = 0; j < width; ++j)
          sum = fma(j < kMaxKeptWidth ? kept[j] : weight(j),
                    j < width - 1 ? states.get(columns - (width - 1 - j) * dilation) : newest, sum);
        result = silu_on ? silu(sum) : sum;
        if (columns > 0) {
          states.shift();
          states.put(columns - 1, newest);
        }
      }
      store_lanes(y, y_dim, result, n);
    }
  }
}

void dispatch(const CausalConv1dUpdate& a, int64_t begin, int64_t end) {
  with_type(a.type, [&](auto x) {
    with_type(a.state_type, [&](auto s) {
      for (int64_t d = begin; d < end; d += kLanes)
        update_channels<decltype(x), decltype(s)>(a, d, end - d < kLanes ? end - d : kLanes);
    });
  });
}

}  // namespace
}  // namespace effinfer
