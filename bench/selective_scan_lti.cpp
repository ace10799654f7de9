#include "ops/selective_scan_lti/selective_scan_lti.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// An S4D layer: D and `state` numbers a channel, time-major.
Case lti_case(int64_t length, int64_t dim, int64_t state, bool complex, DType type) {
  const int64_t numbers = dim * state * (complex ? 2 : 1);
  const auto u = values(length * dim, type), y = values(length * dim, type);
  const auto A = values(numbers, DType::f32, 0.5f, 0.7f), B = values(numbers), C = values(numbers),
             D = values(dim), last = values(numbers);
  SelectiveScanLti args = {};
  args.u = {u.get(), 0, 1, dim, type};
  args.y = {y.get(), 0, 1, dim, type};
  args.A = floats(A);
  args.B = floats(B);
  args.C = floats(C);
  args.D = floats(D);
  args.last_state = floats(last);
  args.batch = args.sequences = 1;
  args.dim = dim;
  args.length = length;
  args.state = state;
  args.complex = complex;
  const auto elements = static_cast<double>(length * dim);
  return {
      .shape = "L" + std::to_string(length) + " D" + std::to_string(dim) + " N" +
               std::to_string(state) + (complex ? " complex" : " real"),
      .dtype = type,
      // An FMA port's operation counts as two, a product's too: 8 a complex number, 3 a real one.
      .flops = elements * 2.0 * (static_cast<double>(state) * (complex ? 8.0 : 3.0) + 1.0),
      .bytes = elements * 2.0 * static_cast<double>(size_of(type)),
      .run =
          [=, owned = std::vector{u, y, A, B, C, D, last}]() mutable {
            thread_local std::vector<float> scratch;
            scratch.resize(static_cast<size_t>(selective_scan_lti_scratch(args)) / sizeof(float));
            args.scratch = scratch.data();
            selective_scan_lti(args);
          },
  };
}

std::vector<Case> lti_cases() {
  return {lti_case(512, 768, 32, true, DType::f32), lti_case(2048, 768, 32, true, DType::f32),
          lti_case(512, 768, 32, true, DType::bf16), lti_case(512, 768, 64, false, DType::f32)};
}

const Registration kSelectiveScanLti("selective_scan_lti", lti_cases);

}  // namespace
}  // namespace effinfer::bench
