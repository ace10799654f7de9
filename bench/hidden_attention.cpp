#include "ops/hidden_attention/hidden_attention.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case attention_case(int64_t length, int64_t dim, int64_t state, DType type) {
  const auto delta = values(length * dim, type, -5.f, -1.f);
  const auto B = values(length * state, type), C = values(length * state, type);
  const auto A = values(dim * state, DType::f32, -16.f, -1.f);
  const auto alpha = values(dim * length * length);
  HiddenAttention args = {};
  args.delta = {delta.get(), 0, 1, dim, type};
  args.A = floats(A);
  args.B = {B.get(), 0, 0, 1, state, 1, type, false};
  args.C = {C.get(), 0, 0, 1, state, 1, type, false};
  args.alpha = floats(alpha);
  args.batch = 1;
  args.dim = dim;
  args.length = length;
  args.state = state;
  args.softplus = true;
  const auto pairs = static_cast<double>(dim * length * (length + 1) / 2);
  return {
      .shape =
          "L" + std::to_string(length) + " D" + std::to_string(dim) + " N" + std::to_string(state),
      .dtype = type,
      .flops = pairs * 4.0 * static_cast<double>(state),  // a product counts as an FMA
      .bytes = static_cast<double>(dim * length * length) * 4.0,
      .run =
          [=, owned = std::vector{delta, B, C, A, alpha}]() mutable {
            thread_local std::vector<float> scratch;
            scratch.resize(static_cast<size_t>(hidden_attention_scratch(args)) / sizeof(float));
            args.scratch = scratch.data();
            hidden_attention(args);
          },
  };
}

std::vector<Case> attention_cases() { return {attention_case(256, 64, 16, DType::f32)}; }

const Registration kHiddenAttention("hidden_attention", attention_cases);

}  // namespace
}  // namespace effinfer::bench
