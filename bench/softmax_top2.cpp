#include "ops/softmax_top2/softmax_top2.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

Case top2_case(int64_t rows, int64_t vocab, DType type) {
  const auto x = values(rows * vocab, type, -10.f, 10.f), y = values(rows * 2);
  const auto elements = static_cast<double>(rows * vocab);
  return {
      .shape = "R" + std::to_string(rows) + " V" + std::to_string(vocab),
      .dtype = type,
      .flops = 10.0 * elements,
      .bytes = elements * size_of(type),
      .run =
          [=] {
            softmax_top2({.x = x.get(),
                          .y = floats(y),
                          .rows = rows,
                          .dim = vocab,
                          .x_stride = vocab,
                          .type = type});
          },
  };
}

std::vector<Case> top2_cases() {
  return {top2_case(1, 32000, DType::f32), top2_case(64, 1024, DType::f32),
          top2_case(64, 32000, DType::f32), top2_case(64, 32000, DType::bf16)};
}

const Registration kSoftmaxTop2("softmax_top2", top2_cases);

}  // namespace
}  // namespace effinfer::bench
