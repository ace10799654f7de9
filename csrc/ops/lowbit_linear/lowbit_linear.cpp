#include "ops/lowbit_linear/lowbit_linear.h"

#include "ops/linear/tasks.h"

namespace effinfer {
namespace {

constexpr Kernel<LowbitKernels> kKernels[] = {
#if defined(__x86_64__)
    {"avx512vnni",
     kAvx2 | kAvx512 | kAvx512Vnni,
     {lowbit_quantize_avx2, lowbit_int8_avx512_vnni, lowbit_float_avx512}},
    {"avx512", kAvx2 | kAvx512, {lowbit_quantize_avx2, lowbit_int8_avx2, lowbit_float_avx512}},
    {"avx2", kAvx2, {lowbit_quantize_avx2, lowbit_int8_avx2, lowbit_float_avx2}},
#elif defined(__aarch64__)
    {"i8mm", kI8mm, {lowbit_quantize_neon, lowbit_int8_neon_i8mm, lowbit_float_neon}},
    {"dotprod", kDotprod, {lowbit_quantize_neon, lowbit_int8_neon_dotprod, lowbit_float_neon}},
    {"neon", kNeon, {lowbit_quantize_neon, lowbit_int8_neon, lowbit_float_neon}},
#endif
    {"scalar", kScalar, {lowbit_quantize_scalar, lowbit_int8_scalar, lowbit_float_scalar}},
};

constexpr int64_t kLine = 64;
constexpr int64_t kActivationBytes = 256 << 10;  // of one task: they stay in L2 beside the weights
constexpr int64_t kLeastTaskRows = 32;           // what decoding a weight once must serve
constexpr int64_t kRowStep = 12;                 // a multiple of every kernel's tile
constexpr int64_t kWorthThreads = 1 << 16;       // elements of x quantized, about 16 us

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

bool empty(const LowbitLinear& a) { return a.io.rows <= 0 || a.io.n <= 0; }

// Codes may be read to the end of a unit, and of 64 k where a kernel takes several. One line more,
// so that rows of a power of two do not all fall into the same sets of the cache.
int64_t code_stride(const LowbitLinear& a) {
  const int64_t unit = lowbit::layout(a.weight.format).unit_k;
  return round_up(round_up(a.io.k, unit), kLine) + kLine;
}

int64_t groups(const LowbitLinear& a) { return ceil_div(a.io.k, a.weight.group); }

LinearCut int8_cut(const LowbitLinear& a) {
  const int64_t fitting = std::max(kLeastTaskRows, kActivationBytes / code_stride(a));
  LinearCut c = {};
  c.row_parts = ceil_div(a.io.rows, std::min(fitting, linear_layout::kMaxRows));
  c.rows = c.row_parts == 1 ? a.io.rows : round_up(ceil_div(a.io.rows, c.row_parts), kRowStep);
  c.row_parts = ceil_div(a.io.rows, c.rows);
  share_panels(a.io, c);
  return c;
}

// The rows' part of the scratch, and how many floats it takes.
int64_t place_rows(const LowbitLinear& a, LowbitRows& q) {
  q.stride = code_stride(a);
  q.groups = groups(a);
  q.codes = reinterpret_cast<int8_t*>(a.io.scratch);
  const int64_t code_floats = a.io.rows * q.stride / 4;
  q.scale = a.io.scratch + code_floats;
  q.sums = reinterpret_cast<int32_t*>(q.scale + a.io.rows);
  const int64_t before = round_up(code_floats + a.io.rows + a.io.rows * q.groups, kLine / 4);
  q.table_stride = lowbit::table_bytes(a);
  q.tables = q.table_stride > 0 ? reinterpret_cast<uint8_t*>(a.io.scratch + before) : nullptr;
  const int64_t tables_end = before + a.io.rows * q.table_stride / 4;
  const int64_t reaches = a.io.rows * lowbit::spans(a);
  q.reach = reaches > 0 ? reinterpret_cast<uint16_t*>(a.io.scratch + tables_end) : nullptr;
  return tables_end + round_up(reaches, 2 * kLine / 4) / 2;
}

void run_int8(const LowbitLinear& a, const LowbitKernels& kernels) {
  LowbitRows q;
  const int64_t before = place_rows(a, q);
  if (a.io.rows == 1 || a.io.rows * a.io.k < kWorthThreads)
    kernels.quantize(a, q, 0, a.io.rows);
  else
    parallel_ranges(
        a.io.rows, ceil_div(kWorthThreads / 4, a.io.k),
        [&](int64_t begin, int64_t end, int64_t) { kernels.quantize(a, q, begin, end - begin); });
  Linear io = a.io;
  io.scratch += before;
  const LinearCut c = int8_cut(a);
  linear_tasks(io, c, lowbit_int8_scratch(c.rows),
               [&](const LinearTask& t) { kernels.int8(a, q, t); });
}

}  // namespace

const Kernel<LowbitKernels>& lowbit_linear_kernel() { return pick(kKernels); }

size_t lowbit_linear_scratch(const LowbitLinear& a) {
  if (empty(a)) return 0;
  int64_t floats = 0;
  if (a.int8_activations) {
    LowbitRows q;
    floats = place_rows(a, q) + a.io.slots * lowbit_int8_scratch(int8_cut(a).rows);
  } else {
    floats = a.io.slots * linear_scratch_per_slot(a.io, linear_cut(a.io));
  }
  return static_cast<size_t>(floats) * sizeof(float);
}

void lowbit_linear(const LowbitLinear& a) {
  if (empty(a)) return;
  const LowbitKernels& kernels = lowbit_linear_kernel().run;
  if (a.int8_activations) return run_int8(a, kernels);
  const LinearCut c = linear_cut(a.io);
  linear_tasks(a.io, c, linear_scratch_per_slot(a.io, c),
               [&](const LinearTask& t) { kernels.floats(a, t); });
}

}  // namespace effinfer
