#include "ops/lowbit_linear/lowbit_linear.h"

#include <algorithm>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench::lowbit_linear {
namespace {

constexpr int64_t kDramBytes = 160 << 20;  // several times any cache
constexpr int64_t kFewRows = 16;

struct Format {
  const char* name;
  LowbitFormat format;
  int64_t group;  // 0: all of k
  uint8_t mask;   // leaves valid codes of random bytes
  bool int8_activations;
  Peak peak;
};

constexpr Format kFormats[] = {
    {"w8 a8", LowbitFormat::int8, 0, 0xff, true, Peak::int8},
    {"w4 g128 a8", LowbitFormat::int4, 128, 0xff, true, Peak::code},
    {"w3 g128 a8", LowbitFormat::int3, 128, 0xff, true, Peak::code},
    {"w2 g128 a8", LowbitFormat::int2, 128, 0xff, true, Peak::code},
    {"ternary a8", LowbitFormat::ternary, 0, 0x55, true, Peak::code},
    {"ternary 1.6 a8", LowbitFormat::ternary_dense, 0, 0x77, true, Peak::code},
    {"w1 g128 a8", LowbitFormat::binary, 128, 0xff, true, Peak::code},
    {"w4 g128 f32", LowbitFormat::int4, 128, 0xff, false, Peak::fma},
    {"w2 g128 f32", LowbitFormat::int2, 128, 0xff, false, Peak::fma},
};

// Packed weights of a format: few rows walk through all of it, matrix by matrix, so that the
// weights come from DRAM; many rows stay with the first one. Codes of 0 or 1 alone where a format
// has less than its bits could say, which takes no other time.
std::shared_ptr<void> weights(uint8_t mask) {
  static std::shared_ptr<void> held[256];
  auto& buffer = held[mask];
  if (buffer == nullptr) {
    buffer.reset(std::aligned_alloc(size_t{2} << 20, kDramBytes), std::free);
    advise_huge_pages(buffer.get(), kDramBytes);
    auto* bytes = static_cast<uint8_t*>(buffer.get());
    uint32_t state = 1;
    for (int64_t i = 0; i < kDramBytes; ++i) {
      state = state * 1664525u + 1013904223u;
      bytes[i] = static_cast<uint8_t>(state >> 24) & mask;
    }
  }
  return buffer;
}

Case make_case(const Format& f, int64_t rows, int64_t k, int64_t n) {
  constexpr int64_t kPanel = linear_layout::kPanel;
  const lowbit::Layout layout = lowbit::layout(f.format);
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t panel_bytes = (k + layout.unit_k - 1) / layout.unit_k * layout.unit_bytes;
  const int64_t matrix = panels * panel_bytes;
  const int64_t group = f.group > 0 ? f.group : k, groups = (k + group - 1) / group;
  const int64_t copies = rows <= kFewRows ? kDramBytes / matrix : 1;
  const auto x = values(rows * k), y = values(rows * n);
  const auto scales = values(copies * panels * groups * kPanel, DType::f16, 0.01f, 0.02f);
  auto scratch = std::make_shared<std::vector<float>>();
  auto turn = std::make_shared<int64_t>(0);
  const int64_t read = matrix + panels * groups * kPanel * size_of(DType::f16);
  return {
      .shape = std::string(f.name) + " R" + std::to_string(rows) + " K" + std::to_string(k) + " N" +
               std::to_string(n),
      .dtype = DType::f32,
      .flops = 2.0 * static_cast<double>(rows) * static_cast<double>(n * k),
      .bytes = static_cast<double>(read + rows * (n + k) * size_of(DType::f32)),
      .run =
          [=] {
            const auto packed = weights(f.mask);
            const int64_t copy = (*turn)++ % copies;
            LowbitLinear args = {};
            args.io.x = x.get();
            args.io.y = y.get();
            args.io.rows = rows;
            args.io.n = n;
            args.io.k = k;
            args.io.x_stride = k;
            args.io.y_stride = n;
            args.io.slots = num_threads();
            args.weight.packed = static_cast<const uint8_t*>(packed.get()) + copy * matrix;
            args.weight.scale = static_cast<const char*>(scales.get()) +
                                copy * panels * groups * kPanel * size_of(DType::f16);
            args.weight.panel_stride = panel_bytes;
            args.weight.scale_stride = groups * kPanel;
            args.weight.group = group;
            args.weight.scale_type = DType::f16;
            args.weight.format = f.format;
            args.int8_activations = f.int8_activations;
            scratch->resize(
                std::max(scratch->size(), lowbit_linear_scratch(args) / sizeof(float) + 16));
            const auto at = reinterpret_cast<uintptr_t>(scratch->data());
            args.io.scratch = reinterpret_cast<float*>((at + 63) / 64 * 64);
            effinfer::lowbit_linear(args);
          },
      .peak = f.peak,
  };
}

std::vector<Case> cases() {
  constexpr int64_t kShapes[][2] = {{4096, 4096}, {4096, 11008}};
  std::vector<Case> all;
  for (const Format& f : kFormats)
    for (const auto& [k, n] : kShapes)
      for (const int64_t rows : {1, 8, 32, 128, 512}) all.push_back(make_case(f, rows, k, n));
  return all;
}

const Registration kLowbitLinear("lowbit_linear", cases);

}  // namespace
}  // namespace effinfer::bench::lowbit_linear
