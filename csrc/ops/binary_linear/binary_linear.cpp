#include "ops/binary_linear/binary_linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/parallel.h"

namespace effinfer {
namespace {

using namespace binary_layout;

constexpr Kernel<BinaryKernels> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, {binary_signs_avx512, binary_count_avx512, binary_finish_avx512}},
    {"avx2", kAvx2, {binary_signs_avx2, binary_count_avx2, binary_finish_avx2}},
#elif defined(__aarch64__)
    {"neon", kNeon, {binary_signs_neon, binary_count_neon, binary_finish_neon}},
#endif
    {"scalar", kScalar, {binary_signs_scalar, binary_count_scalar, binary_finish_scalar}},
};

constexpr int64_t kChunk = 1536;            // rows whose signs are held at a time
constexpr int64_t kMaxRows = 96;            // rows of one task: their counts stay in L2
constexpr int64_t kMaxPanels = 64;          // panels of one task
constexpr int64_t kTasksPerSlot = 4;        // enough for a slow worker to be made up for
constexpr int64_t kWorthThreads = 1 << 22;  // products: under about 10 us a thread costs more
constexpr int64_t kSignGrain = 1 << 16;     // values whose signs are worth a thread
constexpr int64_t kAlign = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// The scratch: signs and scales of a chunk of rows, then one part of counts per slot.
struct Scratch {
  int64_t task_rows, bits_stride;
  int64_t scales, counts, per_slot;  // where they begin, and how much a slot has, in bytes
  int64_t total;

  explicit Scratch(const BinaryLinear& a) {
    const int64_t rows = std::min(a.rows, kChunk);
    task_rows = std::min(a.rows, kMaxRows);
    bits_stride = bytes_of(a.k);
    scales = aligned(rows * bits_stride);
    counts = scales + aligned(a.mean_scale ? rows * static_cast<int64_t>(sizeof(float)) : 0);
    per_slot = counts_of(task_rows) * static_cast<int64_t>(sizeof(int32_t));
    total = counts + a.slots * per_slot;
  }
};

bool empty(const BinaryLinear& a) { return a.rows <= 0 || a.n <= 0; }

// Rows of the output whose signs are ready.
struct Chunk {
  int64_t row, rows;
  const uint8_t* bits;
  const float* x_scale;  // of the chunk's rows, or null
};

void take_signs(const BinaryLinear& a, const BinaryKernels& kernels, const Chunk& chunk,
                uint8_t* bits, float* mean) {
  const int64_t stride = bytes_of(a.k);
  parallel_ranges(chunk.rows, 1 + kSignGrain / (a.k + 1), [&](int64_t begin, int64_t end, int64_t) {
    const int64_t first = chunk.row + begin;
    uint8_t* const to = bits + begin * stride;
    if (a.x_is_bits) {
      const auto* from = static_cast<const uint8_t*>(a.x) + first * a.x_stride;
      return copy_bits(from, a.x_stride, end - begin, a.k, to);
    }
    SignRows s = {};
    s.x = static_cast<const char*>(a.x) + first * a.x_stride * size_of(a.x_type);
    s.bits = to;
    s.mean = mean == nullptr ? nullptr : mean + begin;
    s.rows = end - begin;
    s.k = a.k;
    s.x_stride = a.x_stride;
    s.bits_stride = stride;
    s.type = a.x_type;
    kernels.signs(s);
  });
}

// One group of panels for some of a chunk's rows, from bits to y.
void multiply(const BinaryLinear& a, const BinaryKernels& kernels, const Chunk& chunk, int64_t row,
              int64_t rows, int64_t panel, int64_t panels, int32_t* counts) {
  const int64_t bytes = bytes_of(a.k), n = panel * kOutputs, size = size_of(a.y_type);
  kernels.count({.x = chunk.bits + row * bytes,
                 .weight = a.weight + panel * a.panel_stride,
                 .counts = counts,
                 .rows = rows,
                 .panels = panels,
                 .bytes = bytes,
                 .x_stride = bytes,
                 .panel_stride = a.panel_stride});
  const auto terms = static_cast<int32_t>(a.k);
  const int64_t y_row = chunk.row + row;
  FinishTask f = {};
  f.counts = counts;
  f.terms = &terms;
  if (a.weight_scale != nullptr) f.weight_scale = a.weight_scale + n;
  if (a.bias != nullptr) f.bias = a.bias + n;
  if (chunk.x_scale != nullptr) f.x_scale = chunk.x_scale + row;
  if (a.residual != nullptr)
    f.residual = static_cast<const char*>(a.residual) + (y_row * a.residual_stride + n) * size;
  f.y = static_cast<char*>(a.y) + (y_row * a.y_stride + n) * size;
  f.rows = rows;
  f.outputs = std::min(panels * kOutputs, a.n - n);
  f.residual_stride = a.residual_stride;
  f.y_stride = a.y_stride;
  f.type = a.y_type;
  f.epilogue = a.epilogue;
  kernels.finish(f);
}

void run_chunk(const BinaryLinear& a, const BinaryKernels& kernels, const Scratch& scratch,
               const Chunk& chunk) {
  const int64_t all = panels_of(a.n), wanted = a.slots > 1 ? a.slots * kTasksPerSlot : 1;
  const int64_t row_parts = ceil_div(chunk.rows, scratch.task_rows);
  int64_t width = kMaxPanels;
  while (width > kGroup && row_parts * ceil_div(all, width) < wanted) width /= 2;
  const int64_t tasks = row_parts * ceil_div(all, width);
  std::atomic<int64_t> next{0};
  // The chunk of parallel_for is a slot, and slots claim tasks: what a thread may write is its
  // slot's, whatever the number of threads has become since the scratch was sized.
  auto work = [&](int64_t slot, int64_t) {
    auto* const counts = reinterpret_cast<int32_t*>(static_cast<char*>(a.scratch) + scratch.counts +
                                                    slot * scratch.per_slot);
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t row = t % row_parts * scratch.task_rows, first = t / row_parts * width;
      const int64_t rows = std::min(scratch.task_rows, chunk.rows - row);
      const int64_t last = std::min(first + width, all);
      for (int64_t panel = first; panel < last; panel += kGroup)
        multiply(a, kernels, chunk, row, rows, panel, std::min(kGroup, last - panel), counts);
    }
  };
  if (a.slots <= 1 || chunk.rows * a.n * a.k < kWorthThreads)
    work(0, 0);
  else
    parallel_for(std::min(a.slots, tasks), work);
}

}  // namespace

const Kernel<BinaryKernels>& binary_linear_kernel() { return pick(kKernels); }

void copy_bits(const uint8_t* x, int64_t x_stride, int64_t rows, int64_t k, uint8_t* bits) {
  const int64_t bytes = bytes_of(k);
  if (bytes == 0) return;
  const unsigned last = 0xff >> (8 * bytes - k);
  for (int64_t row = 0; row < rows; ++row, bits += bytes) {
    std::memcpy(bits, x + row * x_stride, bytes);
    bits[bytes - 1] = static_cast<uint8_t>(bits[bytes - 1] & last);
  }
}

size_t binary_linear_scratch(const BinaryLinear& a) {
  return empty(a) ? 0 : static_cast<size_t>(Scratch(a).total);
}

void binary_linear(const BinaryLinear& a) {
  if (empty(a)) return;
  const BinaryKernels& kernels = binary_linear_kernel().run;
  const Scratch scratch(a);
  auto* const bits = static_cast<uint8_t*>(a.scratch);
  auto* const mean =
      a.mean_scale ? reinterpret_cast<float*>(bits + scratch.scales) : static_cast<float*>(nullptr);
  for (int64_t row = 0; row < a.rows; row += kChunk) {
    Chunk chunk = {row, std::min(kChunk, a.rows - row), bits, mean};
    if (a.x_scale != nullptr) chunk.x_scale = a.x_scale + row;
    take_signs(a, kernels, chunk, bits, mean);
    run_chunk(a, kernels, scratch, chunk);
  }
}

}  // namespace effinfer
