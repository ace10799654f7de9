// causal_conv1d_update over vec.h: channels in the lanes, one vector of them for every row, so that
// its weights are transposed once.
#include "base/vec.h"
#include "ops/causal_conv1d/lanes.h"
#include "ops/causal_conv1d_update/causal_conv1d_update.h"

namespace effinfer {
namespace {

constexpr int64_t kMaxKeptWidth = 8;  // taps whose weights stay in registers

// n elements of x or y from `at` on, where the type is not worth a copy of the caller.
__attribute__((noinline)) Vec load_any(const void* data, DType type, int64_t at, int64_t stride,
                                       int64_t n) {
  Vec x{};
  with_type(type,
            [&](auto t) { x = load_lanes(static_cast<const decltype(t)*>(data) + at, stride, n); });
  return x;
}

__attribute__((noinline)) void store_any(void* data, DType type, int64_t at, int64_t stride, Vec x,
                                         int64_t n) {
  with_type(type, [&](auto t) { store_lanes(static_cast<decltype(t)*>(data) + at, stride, x, n); });
}

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

// The elements at even and at odd places of two vectors, and back.
template <int... j>
EFFINFER_INLINE void part(Vec& a, Vec& b, Lanes<j...>) {
  const Vec even = __builtin_shufflevector(a, b, (2 * j)...);
  b = __builtin_shufflevector(a, b, (2 * j + 1)...);
  a = even;
}
template <int... j>
EFFINFER_INLINE void join(Vec& a, Vec& b, Lanes<j...>) {
  const Vec low = __builtin_shufflevector(a, b, (j % 2 * kLanes + j / 2)...);
  b = __builtin_shufflevector(a, b, (j % 2 * kLanes + j / 2 + kLanes / 2)...);
  a = low;
}

// Four dense columns of kLanes channels. In a model's step they are not in cache, and hardware
// prefetchers stop at the end of a page, after 256 channels: without these prefetches the whole
// update takes 14 us instead of 10.
constexpr int64_t kFour = 4;

template <class T>
EFFINFER_INLINE void load_fours(const T* p, Vec (&c)[kFour]) {
  constexpr int64_t kBytes = kFour * kLanes * static_cast<int64_t>(sizeof(T)), kLine = 64;
  constexpr int64_t kAhead = 16 * kBytes;
  EFFINFER_UNROLL
  for (int64_t i = 0; i < kBytes; i += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + i);
  for (int i = 0; i < kFour; ++i) c[i] = load(p + i * kLanes);
  part(c[0], c[1], AllLanes{});
  part(c[2], c[3], AllLanes{});
  part(c[0], c[2], AllLanes{});
  part(c[1], c[3], AllLanes{});
}

template <class T>
EFFINFER_INLINE void store_fours(T* p, Vec c0, Vec c1, Vec c2, Vec c3) {
  join(c0, c2, AllLanes{});
  join(c1, c3, AllLanes{});
  join(c0, c1, AllLanes{});
  join(c2, c3, AllLanes{});
  store(p, c0);
  store(p + kLanes, c1);
  store(p + 2 * kLanes, c2);
  store(p + 3 * kLanes, c3);
}

// kLanes channels of width 4 with dense states of 4 columns, as every Mamba has them, x and y
// dense.
template <class X, class S>
void update_fours(const CausalConv1dUpdate& a, int64_t d) {
  Vec weight[kFour], column[kFour];
  load_fours(a.weight + d * kFour, weight);
  const Vec bias = a.bias != nullptr ? load(a.bias + d) : Vec{};
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t slot = a.slots != nullptr ? a.slots[b] : b;
    S* const state = static_cast<S*>(a.state) + slot * a.state_slot + d * kFour;
    for (int64_t t = 0; t < a.length; ++t) {
      Vec result{};
      if (slot >= 0) {
        const Vec newest = load(static_cast<const X*>(a.x) + b * a.x_batch + d + t * a.x_time);
        load_fours(state, column);
        Vec sum = bias;
        for (int j = 0; j < kFour - 1; ++j) sum = fma(weight[j], column[j + 1], sum);
        sum = fma(weight[3], newest, sum);
        result = a.silu ? silu(sum) : sum;
        store_fours(state, column[1], column[2], column[3], newest);
      }
      store(static_cast<X*>(a.y) + b * a.y_batch + d + t * a.y_time, result);
    }
  }
}

template <class S>
void update_channels(const CausalConv1dUpdate& a, int64_t d, int64_t n) {
  const int64_t width = a.width, dilation = a.dilation, columns = a.columns, length = a.length;
  const bool silu_on = a.silu;
  const Vec bias = a.bias != nullptr ? load_lanes(a.bias + d, 1, n) : Vec{};
  Vec kept[kMaxKeptWidth];
  const auto weight = [&](int64_t j) { return load_lanes(a.weight + d * width + j, width, n); };
  for (int64_t j = 0; j < width && j < kMaxKeptWidth; ++j) kept[j] = weight(j);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t slot = a.slots != nullptr ? a.slots[b] : b;
    int64_t x = b * a.x_batch + d * a.x_dim, y = b * a.y_batch + d * a.y_dim;
    const States<S> states = {static_cast<S*>(a.state) + slot * a.state_slot + d * a.state_dim,
                              a.state_dim, a.state_column, columns, n};
    for (int64_t t = 0; t < length; ++t, x += a.x_time, y += a.y_time) {
      Vec result{};
      if (slot >= 0) {
        const Vec newest = load_any(a.x, a.type, x, a.x_dim, n);
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
      store_any(a.y, a.type, y, a.y_dim, result, n);
    }
  }
}

void dispatch(const CausalConv1dUpdate& a, int64_t begin, int64_t end) {
  with_type(a.state_type, [&](auto s) {
    using State = decltype(s);
    if (a.width == kFour && a.dilation == 1 && a.columns == kFour && a.state_column == 1 &&
        a.state_dim == kFour && a.x_dim == 1 && a.y_dim == 1)
      with_type(a.type, [&](auto x) {
        for (; begin + kLanes <= end; begin += kLanes) update_fours<decltype(x), State>(a, begin);
      });
    for (; begin < end; begin += kLanes)
      update_channels<State>(a, begin, end - begin < kLanes ? end - begin : kLanes);
  });
}

}  // namespace
}  // namespace effinfer
