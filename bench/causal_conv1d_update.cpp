#include "ops/causal_conv1d_update/causal_conv1d_update.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case update_case(int64_t batch, int64_t dim, int64_t width, DType type) {
  const auto x = values(batch * dim, type), y = values(batch * dim, type),
             state = values(batch * dim * width), weight = values(dim * width), bias = values(dim);
  return {
      .shape =
          "B" + std::to_string(batch) + " D" + std::to_string(dim) + " W" + std::to_string(width),
      .dtype = type,
      .flops = 2.0 * static_cast<double>(batch * dim * width),
      .bytes = static_cast<double>(batch * dim * (2 * size_of(type) + 2 * width * 4) +
                                   dim * (width + 1) * 4),
      .run =
          [=] {
            causal_conv1d_update({.x = x.get(),
                                  .state = state.get(),
                                  .weight = floats(weight),
                                  .bias = floats(bias),
                                  .slots = nullptr,
                                  .y = y.get(),
                                  .batch = batch,
                                  .dim = dim,
                                  .length = 1,
                                  .width = width,
                                  .dilation = 1,
                                  .columns = width,
                                  .pool = batch,
                                  .x_batch = dim,
                                  .x_dim = 1,
                                  .x_time = 1,
                                  .y_batch = dim,
                                  .y_dim = 1,
                                  .y_time = 1,
                                  .state_slot = dim * width,
                                  .state_dim = width,
                                  .state_column = 1,
                                  .type = type,
                                  .state_type = DType::f32,
                                  .silu = true});
          },
  };
}

std::vector<Case> update_cases() {
  return {update_case(1, 1536, 4, DType::f32), update_case(8, 1536, 4, DType::f32),
          update_case(8, 1536, 4, DType::bf16)};
}

const Registration kUpdate("causal_conv1d_update", update_cases);

}  // namespace
}  // namespace effinfer::bench
