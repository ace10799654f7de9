#include "ops/binary_conv2d/binary_conv2d.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/parallel.h"
#include "ops/binary_conv2d/patches.h"
#include "ops/binary_linear/binary_linear.h"

namespace effinfer {
namespace {

using namespace binary_layout;

constexpr Kernel<BinaryConv2dFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, binary_conv2d_avx512},
    {"avx2", kAvx2, binary_conv2d_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, binary_conv2d_neon},
#endif
    {"scalar", kScalar, binary_conv2d_scalar},
};

constexpr int64_t kChunkPixels = 1 << 14;   // of the input whose bits are held at a time
constexpr int64_t kMaxRows = 96;            // output pixels of one task
constexpr int64_t kPatchBytes = 96 << 10;   // of one task: they stay in L2
constexpr int64_t kRowStep = 4;             // rows of the counting tile
constexpr int64_t kTasksPerSlot = 4;        // enough for a slow worker to be made up for
constexpr int64_t kWorthThreads = 1 << 22;  // products: under about 10 us a thread costs more
constexpr int64_t kSignGrain = 1 << 16;     // values whose signs are worth a thread
constexpr int64_t kAlign = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }
bool empty(const BinaryConv2d& a) { return a.batch * a.out_height * a.out_width * a.n <= 0; }

// The scratch: popcounts of the taps' weights, bits of some images, then for each slot patches,
// their terms and counts.
struct Scratch {
  int64_t images;  // at a time
  int64_t task_rows;
  int64_t bits, slots;              // where they begin, in bytes
  int64_t terms, counts, per_slot;  // within a slot
  int64_t total;

  explicit Scratch(const BinaryConv2d& a) {
    constexpr auto kWord = static_cast<int64_t>(sizeof(int32_t));
    const int64_t pixels = std::max<int64_t>(1, a.height * a.width);
    const int64_t patch = std::max<int64_t>(1, patch_bytes(a));
    images = std::min(a.batch, std::max<int64_t>(1, kChunkPixels / pixels));
    const int64_t fitting = std::max(kRowStep, kPatchBytes / patch / kRowStep * kRowStep);
    task_rows = std::min({fitting, kMaxRows, images * a.out_height * a.out_width});
    bits = zero_padded(a) ? aligned(tap_counts_size(a) * kWord) : 0;
    slots = bits + aligned(images * pixels * bytes_of(a.channels));
    terms = aligned(task_rows * patch);
    counts = terms + aligned(task_rows * kWord);
    per_slot = counts + counts_of(task_rows) * kWord;
    total = slots + a.slots * per_slot;
  }
};

// Some images whose bits are ready.
struct Chunk {
  int64_t image, images;
  const uint8_t* bits;
  const int32_t* tap_counts;  // where zero_padded()
};

void take_signs(const BinaryConv2d& a, const BinaryKernels& kernels, const Chunk& chunk,
                uint8_t* bits) {
  const int64_t image_pixels = a.height * a.width, stride = bytes_of(a.channels);
  const int64_t first = chunk.image * image_pixels;
  const int64_t grain = 1 + kSignGrain / (a.channels + 1);
  parallel_ranges(chunk.images * image_pixels, grain, [&](int64_t begin, int64_t end, int64_t) {
    if (a.x_is_bits) {
      const auto* from = static_cast<const uint8_t*>(a.x) + (first + begin) * stride;
      return copy_bits(from, stride, end - begin, a.channels, bits + begin * stride);
    }
    const int64_t size = a.x_is_integer ? 4 : size_of(a.x_type);
    SignRows s = {};
    s.x = static_cast<const char*>(a.x) + (first + begin) * a.channels * size;
    s.threshold = a.threshold;
    s.bits = bits + begin * stride;
    s.rows = end - begin;
    s.k = a.channels;
    s.x_stride = a.channels;
    s.bits_stride = stride;
    s.type = a.x_type;
    s.integers = a.x_is_integer;
    kernels.signs(s);
  });
}

// What one slot works with.
struct Workplace {
  uint8_t* patches;
  int32_t *terms, *counts;
};

// From the counts of output pixels [pixel, pixel + rows) and outputs [n, n + outputs) to y.
void finish(const BinaryConv2d& a, const BinaryKernels& kernels, const Workplace& at, int64_t pixel,
            int64_t rows, int64_t n, int64_t outputs) {
  const int64_t first = pixel * a.n + n;
  if (a.fixed) {
    const FixedEpilogue& e = a.fixed_epilogue;
    const auto* residual = static_cast<const int32_t*>(a.residual);
    binary_conv2d_kernel().run(
        {.counts = at.counts,
         .terms = at.terms,
         .epilogue = {e.gain_shift + n, e.pre_bias + n, e.slope_shift + n, e.post_bias + n},
         .residual = residual == nullptr ? nullptr : residual + first,
         .y = static_cast<int32_t*>(a.y) + first,
         .rows = rows,
         .outputs = outputs,
         .y_stride = a.n});
    return;
  }
  const int64_t size = size_of(a.y_type);
  FinishTask f = {};
  f.counts = at.counts;
  f.terms = at.terms;
  if (a.weight_scale != nullptr) f.weight_scale = a.weight_scale + n;
  if (a.bias != nullptr) f.bias = a.bias + n;
  if (a.residual != nullptr) f.residual = static_cast<const char*>(a.residual) + first * size;
  f.y = static_cast<char*>(a.y) + first * size;
  f.rows = rows;
  f.outputs = outputs;
  f.terms_stride = 1;
  f.residual_stride = f.y_stride = a.n;
  f.type = a.y_type;
  f.epilogue = a.epilogue;
  kernels.finish(f);
}

// Output pixels [row, row + rows) of the chunk times panels [panel, last).
void convolve(const BinaryConv2d& a, const BinaryKernels& kernels, const Chunk& chunk, int64_t row,
              int64_t rows, int64_t panel, int64_t last, const Workplace& at) {
  const int64_t bytes = patch_bytes(a);
  take_patches(a, chunk.bits, row, rows, at.patches, at.terms);
  for (; panel < last; panel += kGroup) {
    const int64_t panels = std::min(kGroup, last - panel), n = panel * kOutputs;
    kernels.count({.x = at.patches,
                   .weight = a.weight + panel * a.panel_stride,
                   .counts = at.counts,
                   .rows = rows,
                   .panels = panels,
                   .bytes = bytes,
                   .x_stride = bytes,
                   .panel_stride = a.panel_stride});
    if (zero_padded(a))
      take_back_padding(a, chunk.tap_counts, row, rows, panel, panels, at.terms, at.counts);
    const int64_t pixel = chunk.image * a.out_height * a.out_width + row;
    finish(a, kernels, at, pixel, rows, n, std::min(panels * kOutputs, a.n - n));
  }
}

void run_chunk(const BinaryConv2d& a, const BinaryKernels& kernels, const Scratch& scratch,
               const Chunk& chunk) {
  const int64_t rows = chunk.images * a.out_height * a.out_width, all = panels_of(a.n);
  const int64_t row_parts = ceil_div(rows, scratch.task_rows);
  const int64_t wanted = a.slots > 1 ? a.slots * kTasksPerSlot : 1;
  int64_t width = all;
  while (width > kGroup && row_parts * ceil_div(all, width) < wanted)
    width = std::max(kGroup, width / 2);
  const int64_t tasks = row_parts * ceil_div(all, width);
  std::atomic<int64_t> next{0};
  // The chunk of parallel_for is a slot, and slots claim tasks: what a thread may write is its
  // slot's, whatever the number of threads has become since the scratch was sized.
  auto work = [&](int64_t slot, int64_t) {
    auto* const base = static_cast<uint8_t*>(a.scratch) + scratch.slots + slot * scratch.per_slot;
    const Workplace at = {base, reinterpret_cast<int32_t*>(base + scratch.terms),
                          reinterpret_cast<int32_t*>(base + scratch.counts)};
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t row = t % row_parts * scratch.task_rows, panel = t / row_parts * width;
      convolve(a, kernels, chunk, row, std::min(scratch.task_rows, rows - row), panel,
               std::min(panel + width, all), at);
    }
  };
  if (a.slots <= 1 || rows * a.n * patch_bytes(a) * 8 < kWorthThreads)
    work(0, 0);
  else
    parallel_for(std::min(a.slots, tasks), work);
}

}  // namespace

const Kernel<BinaryConv2dFn>& binary_conv2d_kernel() { return pick(kKernels); }

size_t binary_conv2d_scratch(const BinaryConv2d& a) {
  return empty(a) ? 0 : static_cast<size_t>(Scratch(a).total);
}

void binary_conv2d(const BinaryConv2d& a) {
  if (empty(a)) return;
  const BinaryKernels& kernels = binary_linear_kernel().run;
  const Scratch scratch(a);
  auto* const tap_counts = static_cast<int32_t*>(a.scratch);
  auto* const bits = static_cast<uint8_t*>(a.scratch) + scratch.bits;
  if (zero_padded(a)) count_taps(a, kernels, tap_counts);
  for (int64_t image = 0; image < a.batch; image += scratch.images) {
    const Chunk chunk = {image, std::min(scratch.images, a.batch - image), bits, tap_counts};
    take_signs(a, kernels, chunk, bits);
    run_chunk(a, kernels, scratch, chunk);
  }
}

}  // namespace effinfer
