#include "ops/selective_scan/selective_scan.h"

#include "bench.h"

namespace effinfer::bench {
namespace {

// A Mamba layer's scan: softplus, bias, D and gate; all signals time-major, z half of a wider row.
Case scan_case(int64_t length, int64_t dim, int64_t state, DType type) {
  const auto u = values(length * dim, type), delta = values(length * dim, type, -5.f, -1.f);
  const auto z = values(2 * length * dim, type), y = values(length * dim, type);
  const auto B = values(length * state, type), C = values(length * state, type);
  const auto A = values(dim * state, DType::f32, -16.f, -1.f), D = values(dim),
             last = values(dim * state);
  const auto signal = [=](const std::shared_ptr<void>& data, int64_t row) {
    return ScanSignal{data.get(), 0, 1, row, type};
  };
  SelectiveScan args = {
      .u = signal(u, dim),
      .delta = signal(delta, dim),
      .z = signal(z, 2 * dim),
      .y = signal(y, dim),
      .A = floats(A),
      .B = {B.get(), 0, 0, 1, state, 1, type, false},
      .C = {C.get(), 0, 0, 1, state, 1, type, false},
      .D = floats(D),
      .delta_bias = floats(D),
      .initial_state = nullptr,
      .cu_seqlens = nullptr,
      .mask = nullptr,
      .mask_batch = 0,
      .mask_time = 0,
      .last_state = floats(last),
      .snapshots = nullptr,
      .batch = 1,
      .dim = dim,
      .length = length,
      .state = state,
      .sequences = 1,
      .num_snapshots = 0,
      .softplus = true,
      .reverse = false,
      .scratch = nullptr,
  };
  const auto elements = static_cast<double>(length * dim);
  return {
      .shape =
          "L" + std::to_string(length) + " D" + std::to_string(dim) + " N" + std::to_string(state),
      .dtype = type,
      // Per state: an exp of 5 FMAs and 3 adds, 2 FMAs and 2 products; per element about 60.
      .flops = elements * (19.0 * static_cast<double>(state) + 60.0),
      .bytes = elements * 4.0 * static_cast<double>(size_of(type)),
      .run =
          [=, owned = std::vector{u, delta, z, y, B, C, A, D, last}]() mutable {
            thread_local std::vector<float> scratch;
            scratch.resize(static_cast<size_t>(selective_scan_scratch(args)) / sizeof(float));
            args.scratch = scratch.data();
            selective_scan(args);
          },
  };
}

std::vector<Case> scan_cases() {
  return {scan_case(512, 1536, 16, DType::f32), scan_case(2048, 1536, 16, DType::f32),
          scan_case(512, 1536, 16, DType::bf16), scan_case(512, 8192, 16, DType::f32)};
}

const Registration kSelectiveScan("selective_scan", scan_cases);

}  // namespace
}  // namespace effinfer::bench
