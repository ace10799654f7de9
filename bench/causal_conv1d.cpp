#include "ops/causal_conv1d/causal_conv1d.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// A batch of 1, time-major (as the models' projections leave it) or channel-major.
Case conv_case(int64_t dim, int64_t length, int64_t width, bool time_major, DType type) {
  const int64_t n = dim * length;
  const auto x = values(n, type), y = values(n, type), weight = values(dim * width),
             bias = values(dim), states = values(dim * (width - 1));
  return {
      .shape = "D" + std::to_string(dim) + " L" + std::to_string(length) + " W" +
               std::to_string(width) + (time_major ? " time-major" : " channel-major"),
      .dtype = type,
      .flops = 2.0 * static_cast<double>(n * width),
      .bytes = 2.0 * static_cast<double>(n * size_of(type)),
      .run =
          [=] {
            const int64_t step_dim = time_major ? 1 : length, step_time = time_major ? dim : 1;
            causal_conv1d({.x = x.get(),
                           .weight = floats(weight),
                           .bias = floats(bias),
                           .initial_state = nullptr,
                           .cu_seqlens = nullptr,
                           .mask = nullptr,
                           .y = y.get(),
                           .states = floats(states),
                           .sequences = 1,
                           .dim = dim,
                           .length = length,
                           .width = width,
                           .dilation = 1,
                           .num_states = 1,
                           .x_batch = n,
                           .x_dim = step_dim,
                           .x_time = step_time,
                           .y_batch = n,
                           .y_dim = step_dim,
                           .y_time = step_time,
                           .initial_sequence = 0,
                           .initial_dim = 0,
                           .initial_column = 0,
                           .mask_batch = 0,
                           .mask_time = 0,
                           .type = type,
                           .silu = true});
          },
  };
}

std::vector<Case> conv_cases() {
  std::vector<Case> cases;
  for (int64_t width : {2, 3, 4, 5, 6, 7, 8})
    for (bool time_major : {true, false})
      cases.push_back(conv_case(1536, 512, width, time_major, DType::f32));
  for (bool time_major : {true, false}) {
    cases.push_back(conv_case(8192, 512, 4, time_major, DType::f32));
    cases.push_back(conv_case(8192, 4096, 4, time_major, DType::f32));  // 128 MB: from DRAM
    cases.push_back(conv_case(1536, 512, 4, time_major, DType::bf16));
  }
  return cases;
}

const Registration kConv("causal_conv1d", conv_cases);

}  // namespace
}  // namespace effinfer::bench
