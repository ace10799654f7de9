#include "ops/selective_state_update/selective_state_update.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// A Mamba layer's decode step: softplus, bias, D and gate.
Case step_case(int64_t batch, int64_t dim, int64_t state, DType type) {
  const auto x = values(batch * dim, type), dt = values(batch * dim, type, -5.f, -1.f);
  const auto z = values(batch * dim, type), y = values(batch * dim, type);
  const auto B = values(batch * state, type), C = values(batch * state, type);
  const auto A = values(dim * state, DType::f32, -16.f, -1.f), D = values(dim);
  const auto states = values(batch * dim * state);
  const auto signal = [=](const std::shared_ptr<void>& data) {
    return StepSignal{data.get(), dim, 1, type};
  };
  const SelectiveStateUpdate args = {
      .state = floats(states),
      .state_slot = dim * state,
      .state_channel = state,
      .state_n = 1,
      .x = signal(x),
      .dt = signal(dt),
      .z = signal(z),
      .y = signal(y),
      .A = floats(A),
      .B = {B.get(), state, 0, 1, type},
      .C = {C.get(), state, 0, 1, type},
      .D = floats(D),
      .dt_bias = floats(D),
      .state_indices = nullptr,
      .batch = batch,
      .dim = dim,
      .state_size = state,
      .groups = 1,
      .slots = batch,
      .softplus = true,
  };
  const auto elements = static_cast<double>(batch * dim * state);
  return {
      .shape =
          "B" + std::to_string(batch) + " D" + std::to_string(dim) + " N" + std::to_string(state),
      .dtype = type,
      .flops = 19.0 * elements,
      .bytes = 8.0 * elements + 4.0 * static_cast<double>(dim * state),
      .run = [args, owned = std::vector{x, dt, z, y, B, C, A, D,
                                        states}] { selective_state_update(args); },
  };
}

std::vector<Case> step_cases() {
  return {step_case(1, 1536, 16, DType::f32), step_case(8, 1536, 16, DType::f32),
          step_case(1, 1536, 16, DType::bf16), step_case(1, 8192, 16, DType::f32)};
}

const Registration kStep("selective_state_update", step_cases);

}  // namespace
}  // namespace effinfer::bench
