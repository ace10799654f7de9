#include "ops/ssd/ssd.h"

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench {
namespace {

// One group, D and softplus, as a Mamba-2 layer calls it; x, B and C lie in the rows of one tensor.
Case ssd_case(int64_t batch, int64_t length, int64_t heads, int64_t P, int64_t N, DType type) {
  const int64_t width = heads * P + 2 * N, tokens = batch * length, states = batch * heads * P * N;
  const auto xbc = values(tokens * width, type), dt = values(tokens * heads, type);
  const auto A = values(heads, DType::f32, -16.f, -1.f), D = values(heads);
  const auto bias = values(heads, DType::f32, -5.f, -3.f), y = values(tokens * heads * P, type);
  const auto first = values(states), last = values(states);
  const auto at = [&](int64_t column) {
    return static_cast<const char*>(xbc.get()) + column * size_of(type);
  };
  Ssd args = {};
  args.x = at(0);
  args.dt = dt.get();
  args.A = floats(A);
  args.B = at(heads * P);
  args.C = at(heads * P + N);
  args.D = floats(D);
  args.dt_bias = floats(bias);
  args.initial_state = floats(first);
  args.y = y.get();
  args.last_state = floats(last);
  args.batch = args.sequences = batch;
  args.length = length;
  args.heads = heads;
  args.head_dim = P;
  args.groups = 1;
  args.state_dim = N;
  const auto set = [](int64_t(&strides)[4], int64_t a, int64_t b, int64_t c) {
    strides[0] = a;
    strides[1] = b;
    strides[2] = c;
    strides[3] = 1;
  };
  set(args.x_strides, length * width, width, P);
  set(args.y_strides, length * heads * P, heads * P, P);
  set(args.B_strides, length * width, width, N);
  set(args.C_strides, length * width, width, N);
  args.dt_strides[0] = length * heads;
  args.dt_strides[1] = heads;
  args.dt_strides[2] = 1;
  args.D_strides[0] = args.A_stride = args.dt_bias_stride = 1;
  args.x_type = args.dt_type = args.B_type = type;
  args.dt_max = __builtin_inff();
  args.dt_softplus = true;
  const auto work = static_cast<double>(tokens * heads);
  return {
      .shape = "B" + std::to_string(batch) + " L" + std::to_string(length) + " H" +
               std::to_string(heads) + " P" + std::to_string(P) + " N" + std::to_string(N),
      .dtype = type,
      .flops = work * static_cast<double>(4 * P * N),
      .bytes =
          static_cast<double>((tokens * (width + heads + heads * P)) * size_of(type) + 8 * states),
      .run =
          [=, scratch = std::shared_ptr<void>(),
           owned = std::vector{xbc, dt, A, D, bias, y, first, last},
           capacity = int64_t{0}]() mutable {
            args.slots = num_threads();
            const int64_t needed = ssd_scratch(args);
            if (needed > capacity) scratch = values(capacity = needed);
            args.scratch = floats(scratch);
            ssd(args);
          },
  };
}

std::vector<Case> ssd_cases() {
  return {ssd_case(1, 512, 24, 64, 128, DType::f32),  ssd_case(1, 512, 24, 64, 128, DType::bf16),
          ssd_case(1, 2048, 24, 64, 128, DType::f32), ssd_case(4, 128, 24, 64, 128, DType::f32),
          ssd_case(1, 5, 24, 64, 128, DType::f32),    ssd_case(1, 512, 80, 64, 64, DType::f32)};
}

const Registration kSsd("ssd", ssd_cases);

}  // namespace
}  // namespace effinfer::bench
