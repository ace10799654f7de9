#include "ops/ssd_state_update/ssd_state_update.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// One group, D and softplus, as a Mamba-2 layer decodes.
Case ssd_update_case(int64_t batch, int64_t heads, int64_t P, int64_t N, DType type) {
  const int64_t width = heads * P + 2 * N, states = batch * heads * P * N;
  const auto xbc = values(batch * width, type), dt = values(batch * heads, type);
  const auto A = values(heads, DType::f32, -16.f, -1.f), D = values(heads);
  const auto bias = values(heads, DType::f32, -5.f, -3.f), y = values(batch * heads * P, type);
  const auto state = values(states);
  const auto at = [&](int64_t column) {
    return static_cast<const char*>(xbc.get()) + column * size_of(type);
  };
  const SsdStateUpdate args = {
      .state = floats(state),
      .x = at(0),
      .dt = dt.get(),
      .A = floats(A),
      .B = at(heads * P),
      .C = at(heads * P + N),
      .D = floats(D),
      .z = nullptr,
      .dt_bias = floats(bias),
      .state_indices = nullptr,
      .y = y.get(),
      .batch = batch,
      .heads = heads,
      .head_dim = P,
      .groups = 1,
      .state_dim = N,
      .slots = batch,
      .state_strides = {heads * P * N, P * N, N, 1},
      .x_strides = {width, P, 1},
      .z_strides = {},
      .y_strides = {heads * P, P, 1},
      .dt_strides = {heads, 1, 0},
      .A_strides = {1, 0, 0},
      .B_strides = {width, N, 1},
      .C_strides = {width, N, 1},
      .D_strides = {1, 0},
      .dt_bias_strides = {1, 0},
      .x_type = type,
      .dt_type = type,
      .B_type = type,
      .dt_min = 0.f,
      .dt_max = __builtin_inff(),
      .dt_softplus = true,
  };
  return {
      .shape = "B" + std::to_string(batch) + " H" + std::to_string(heads) + " P" +
               std::to_string(P) + " N" + std::to_string(N),
      .dtype = type,
      .flops = 5.0 * static_cast<double>(states),
      .bytes = 8.0 * static_cast<double>(states),
      .run = [args, owned = std::vector{xbc, dt, A, D, bias, y, state}] { ssd_state_update(args); },
  };
}

std::vector<Case> ssd_update_cases() {
  return {ssd_update_case(1, 24, 64, 128, DType::f32), ssd_update_case(1, 24, 64, 128, DType::bf16),
          ssd_update_case(8, 24, 64, 128, DType::f32),
          ssd_update_case(64, 24, 64, 128, DType::f32)};
}

const Registration kSsdStateUpdate("ssd_state_update", ssd_update_cases);

}  // namespace
}  // namespace effinfer::bench
