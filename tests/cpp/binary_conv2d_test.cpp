#include "ops/binary_conv2d/binary_conv2d.h"

#include <algorithm>

#include "testing.h"

namespace effinfer {
namespace {

using namespace binary_layout;

class BinaryConv2dTest : public testing::PerIsa {};
EFFINFER_PER_ISA(BinaryConv2dTest);

struct Problem {
  int64_t channels, n, kernel, stride, padding, size;
  bool pad_ones;
  int64_t batch = 2, taps = kernel * kernel;
  int64_t out = (size + 2 * padding - kernel) / stride + 1;
  std::vector<float> x = testing::random_floats(batch * size * size * channels, 1);
  std::vector<float> weight =
      testing::random_floats(n * taps * channels, 2);  // [n, taps, channels]

  BinaryConv2d arguments() const {
    BinaryConv2d a = {};
    a.x = x.data();
    a.batch = batch;
    a.height = a.width = size;
    a.channels = channels;
    a.out_height = a.out_width = out;
    a.n = n;
    for (int i = 0; i < 2; ++i) {
      a.kernel[i] = kernel;
      a.stride[i] = stride;
      a.padding[i] = padding;
      a.dilation[i] = 1;
    }
    a.panel_stride = taps * bytes_of(channels) * kOutputs;
    a.pad_ones = pad_ones;
    a.slots = 1;
    return a;
  }

  void run(BinaryConv2d a) const {
    std::vector<uint8_t> packed(panels_of(n) * a.panel_stride);
    for (int64_t o = 0; o < n; ++o)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          if (weight[(o * taps + tap) * channels + c] < 0)
            packed[o / kOutputs * a.panel_stride + (tap * bytes_of(channels) + c / 8) * kOutputs +
                   o % kOutputs] |= 1 << c % 8;
    a.weight = packed.data();
    std::vector<char> scratch(binary_conv2d_scratch(a) + 64);
    a.scratch =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    binary_conv2d(a);
  }

  // The dot product of output channel o at pixel (b, y, x).
  int dot(int64_t b, int64_t at_y, int64_t at_x, int64_t o) const {
    int sum = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t in_y = at_y * stride - padding + tap / kernel;
      const int64_t in_x = at_x * stride - padding + tap % kernel;
      const bool inside = in_y >= 0 && in_y < size && in_x >= 0 && in_x < size;
      if (!inside && !pad_ones) continue;
      for (int64_t c = 0; c < channels; ++c) {
        const bool x_negative = inside && x[((b * size + in_y) * size + in_x) * channels + c] < 0;
        sum += x_negative == (weight[(o * taps + tap) * channels + c] < 0) ? 1 : -1;
      }
    }
    return sum;
  }

  template <class F>
  void each(F&& f) const {
    int64_t i = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t y = 0; y < out; ++y)
        for (int64_t at = 0; at < out; ++at)
          for (int64_t o = 0; o < n; ++o) f(i++, o, dot(b, y, at, o));
  }
};

const std::vector<Problem>& problems() {
  static const std::vector<Problem> all = {
      {1, 1, 1, 1, 0, 1, false},   {20, 40, 3, 1, 1, 5, false}, {20, 40, 3, 1, 1, 5, true},
      {64, 33, 3, 2, 2, 6, false}, {9, 130, 2, 1, 3, 3, false}, {16, 70, 1, 2, 0, 7, false}};
  return all;
}

TEST_P(BinaryConv2dTest, ConvolutionsAreExact) {
  for (const Problem& p : problems()) {
    std::vector<float> y(p.batch * p.out * p.out * p.n);
    BinaryConv2d a = p.arguments();
    a.y = y.data();
    p.run(a);
    p.each([&](int64_t i, int64_t, int dot) { ASSERT_EQ(y[i], static_cast<float>(dot)); });
  }
}

TEST_P(BinaryConv2dTest, FixedEpilogueIsExact) {
  for (const Problem& p : problems()) {
    std::vector<int32_t> x(p.x.size()), gain(p.n), pre(p.n), slope(p.n), post(p.n);
    for (size_t i = 0; i < x.size(); ++i) x[i] = p.x[i] < 0 ? -5 : 3;
    std::vector<int32_t> threshold(p.channels, 3);  // at the threshold a sign is +1
    for (int64_t o = 0; o < p.n; ++o) {
      gain[o] = static_cast<int32_t>(o % 7);
      pre[o] = static_cast<int32_t>(o * 37 % 101 - 50);
      slope[o] = static_cast<int32_t>(o % 32);
      post[o] = static_cast<int32_t>(o * 53 % 97 - 40);
    }
    std::vector<int32_t> y(p.batch * p.out * p.out * p.n), residual(y.size());
    for (size_t i = 0; i < residual.size(); ++i)
      residual[i] = i % 13 == 0 ? INT32_MIN : static_cast<int32_t>(i * 7919 % 4001) - 2000;
    BinaryConv2d a = p.arguments();
    a.x = x.data();
    a.x_is_integer = a.fixed = true;
    a.threshold = threshold.data();
    a.fixed_epilogue = {gain.data(), pre.data(), slope.data(), post.data()};
    a.residual = residual.data();
    a.y = y.data();
    p.run(a);
    p.each([&](int64_t i, int64_t o, int dot) {
      int64_t v = int64_t{dot} * (1 << gain[o]) + pre[o] + std::max(residual[i], -kFixedLimit);
      v = (v < 0 ? v >> slope[o] : v) + post[o];
      ASSERT_EQ(y[i], std::clamp<int64_t>(v, -kFixedLimit, kFixedLimit));
    });
  }
}

}  // namespace
}  // namespace effinfer
