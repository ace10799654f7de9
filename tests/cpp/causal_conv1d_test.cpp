#include "ops/causal_conv1d/causal_conv1d.h"

#include "ops/causal_conv1d_update/causal_conv1d_update.h"
#include "testing.h"

namespace effinfer {
namespace {

class CausalConv1dTest : public testing::PerIsa {};
EFFINFER_PER_ISA(CausalConv1dTest);

enum class Layout { channel_major, time_major, strided };

struct Shape {
  int64_t dim, length, width, dilation;
};

// One packed batch of three sequences (the second empty) with a mask, initial states and two
// states out; every buffer is exactly as long as it has to be, for AddressSanitizer.
template <class T>
struct Problem {
  Shape shape;
  int64_t past = (shape.width - 1) * shape.dilation;
  int64_t step_dim, step_time, elements;
  std::vector<T> x, y;
  std::vector<float> weight, bias, initial, states;
  std::vector<uint8_t> mask;
  std::vector<int32_t> cu_seqlens;

  Problem(Shape s, Layout layout) : shape(s) {
    const int64_t d = s.dim, l = s.length;
    step_dim = layout == Layout::channel_major ? l : layout == Layout::time_major ? 1 : 2 * 3 * l;
    step_time = layout == Layout::channel_major ? 1 : layout == Layout::time_major ? d : 3;
    elements = (d - 1) * step_dim + (l - 1) * step_time + 1;
    x = testing::to_type<T>(testing::random_floats(elements, 1));
    y.resize(elements);
    weight = testing::random_floats(d * s.width, 2, 0.5f);
    bias = testing::random_floats(d, 3);
    initial = testing::random_floats(3 * d * past, 4);
    states.resize(3 * 2 * d * past);
    mask.assign(l, 1);
    for (int64_t t : {l / 3, l / 2}) mask[t] = 0;
    const auto cut = static_cast<int32_t>(l * 2 / 3);
    cu_seqlens = {0, cut, cut, static_cast<int32_t>(l)};
  }

  CausalConv1d args(DType type) {
    return {.x = x.data(),
            .weight = weight.data(),
            .bias = bias.data(),
            .initial_state = initial.data(),
            .cu_seqlens = cu_seqlens.data(),
            .mask = mask.data(),
            .y = y.data(),
            .states = states.data(),
            .sequences = 3,
            .dim = shape.dim,
            .length = shape.length,
            .width = shape.width,
            .dilation = shape.dilation,
            .num_states = 2,
            .x_batch = elements,
            .x_dim = step_dim,
            .x_time = step_time,
            .y_batch = elements,
            .y_dim = step_dim,
            .y_time = step_time,
            .initial_sequence = shape.dim * past,
            .initial_dim = past,
            .initial_column = 1,
            .mask_batch = shape.length,
            .mask_time = 1,
            .type = type,
            .silu = true};
  }

  // Column t of [initial | masked x] of a sequence.
  double column(int64_t sequence, int64_t d, int64_t t) const {
    const int64_t at = cu_seqlens[sequence] + t;
    if (t < 0) return initial[(sequence * shape.dim + d) * past + past + t];
    return mask[at] ? double{scalar::get(&x[d * step_dim + at * step_time])} : 0;
  }
};

template <class T>
void expect_matches_float64(DType type, double bound, Shape shape, Layout layout) {
  Problem<T> p(shape, layout);
  causal_conv1d(p.args(type));
  std::vector<T> got;
  std::vector<double> want;
  for (int64_t s = 0; s < 3; ++s) {
    const int64_t length = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
    for (int64_t d = 0; d < shape.dim; ++d) {
      for (int64_t t = 0; t < length; ++t) {
        double sum = p.bias[d];
        for (int64_t j = 0; j < shape.width; ++j)
          sum += double{p.weight[d * shape.width + j]} *
                 p.column(s, d, t - (shape.width - 1 - j) * shape.dilation);
        const int64_t at = p.cu_seqlens[s] + t;
        want.push_back(p.mask[at] ? sum / (1 + std::exp(-sum)) : 0);
        got.push_back(p.y[d * p.step_dim + at * p.step_time]);
      }
      for (int64_t k = 0; k < 2; ++k)
        for (int64_t c = 0; c < p.past; ++c)
          EXPECT_EQ(p.states[((s * 2 + k) * shape.dim + d) * p.past + c],
                    p.column(s, d, std::max<int64_t>(length - k, 0) - p.past + c));
    }
  }
  EXPECT_LE(testing::relative_error(got, want), bound)
      << "D " << shape.dim << " L " << shape.length << " W " << shape.width << " dilation "
      << shape.dilation << " layout " << static_cast<int>(layout);
}

TEST_P(CausalConv1dTest, MatchesFloat64) {
  for (Layout layout : {Layout::channel_major, Layout::time_major, Layout::strided}) {
    for (Shape shape : {Shape{1, 1, 4, 1},
                        {5, 9, 2, 1},
                        {19, 40, 3, 1},
                        {33, 150, 4, 1},
                        {17, 131, 5, 2},
                        {8, 64, 6, 1},
                        {70, 37, 7, 1},
                        {24, 90, 8, 3},
                        {20, 50, 11, 1},
                        {9, 30, 1, 1},
                        {530, 20, 4, 1}}) {
      expect_matches_float64<float>(DType::f32, 1e-6, shape, layout);
      expect_matches_float64<bf16>(DType::bf16, 4e-3, shape, layout);
      expect_matches_float64<f16>(DType::f16, 5e-4, shape, layout);
    }
  }
}

// Steps from a sequence's start, on pool slots, give the bits of the whole sequence at once.
TEST_P(CausalConv1dTest, UpdateContinuesBitForBit) {
  for (Shape shape : {Shape{21, 13, 4, 1}, {40, 9, 2, 1}, {8, 20, 5, 3}, {3, 6, 10, 1}}) {
    for (int64_t extra : {0, 1}) {
      Problem<float> p(shape, Layout::time_major);
      CausalConv1d whole = p.args(DType::f32);
      whole.cu_seqlens = nullptr;
      whole.mask = nullptr;
      whole.initial_state = nullptr;
      whole.sequences = whole.num_states = 1;
      causal_conv1d(whole);
      const int64_t columns = p.past + extra, slot = 1;
      std::vector<float> pool(2 * shape.dim * columns), y(shape.dim * 2, 7.f);
      const std::vector<int32_t> slots = {-1, slot};
      for (int64_t t = 0; t < shape.length; ++t) {
        // Row 0 is skipped, row 1 steps; both read the same x.
        causal_conv1d_update({.x = p.x.data() + t * p.step_time,
                              .state = pool.data(),
                              .weight = p.weight.data(),
                              .bias = p.bias.data(),
                              .slots = slots.data(),
                              .y = y.data(),
                              .batch = 2,
                              .dim = shape.dim,
                              .length = 1,
                              .width = shape.width,
                              .dilation = shape.dilation,
                              .columns = columns,
                              .pool = 2,
                              .x_batch = 0,
                              .x_dim = 1,
                              .x_time = 1,
                              .y_batch = shape.dim,
                              .y_dim = 1,
                              .y_time = 1,
                              .state_slot = shape.dim * columns,
                              .state_dim = columns,
                              .state_column = 1,
                              .type = DType::f32,
                              .state_type = DType::f32,
                              .silu = true});
        for (int64_t d = 0; d < shape.dim; ++d) {
          EXPECT_EQ(y[d], 0.f);
          EXPECT_EQ(y[shape.dim + d], p.y[d * p.step_dim + t * p.step_time]);
        }
      }
      for (int64_t d = 0; d < shape.dim; ++d)
        for (int64_t c = 0; c < p.past; ++c) {
          EXPECT_EQ(pool[d * columns + c], 0.f);
          EXPECT_EQ(pool[(shape.dim + d) * columns + extra + c], p.states[d * p.past + c]);
        }
    }
  }
}

}  // namespace
}  // namespace effinfer
