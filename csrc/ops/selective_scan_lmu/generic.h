// selective_scan_lmu over vec.h. A row's memory lies along the vector lanes, and up to kLmuRows
// rows walk time together: a step is a small matrix product, [rows, inner] times [inner, state].
#include "ops/scan/rows.h"
#include "ops/selective_scan_lmu/selective_scan_lmu.h"

namespace effinfer {
namespace {

constexpr int kPanelVectors = kLmuPanel / kLanes;

// next[row][columns of kPanels panels] = x[row] times the panels; rows lie `stride` apart.
template <int kRows, int kPanels>
void multiply(const float* panels, const float* x, float* next, int64_t stride, int64_t inner) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vec sum[kRows][kVectors] = {};
  for (int64_t j = 0; j < inner; ++j) {
    Vec w[kVectors];
    EFFINFER_UNROLL
    for (int v = 0; v < kVectors; ++v)
      w[v] =
          load(panels + (v / kPanelVectors * inner + j) * kLmuPanel + v % kPanelVectors * kLanes);
    EFFINFER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec m = splat(x[r * stride + j]);
      EFFINFER_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(w[v], m, sum[r][v]);
    }
  }
  EFFINFER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    EFFINFER_UNROLL
    for (int v = 0; v < kVectors; ++v) store(next + r * stride + v * kLanes, sum[r][v]);
  }
}

// The whole step. Few rows take several panels at once: eight sums hide an FMA's latency.
template <int kRows>
void advance(const SelectiveScanLmu& a, const float* x, float* next, int64_t stride) {
  constexpr int kPanels = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  const int64_t inner = a.inner(), panels = a.panels();
  const float* const from = a.transition;
  int64_t p = 0;
  for (; p + kPanels <= panels; p += kPanels)
    multiply<kRows, kPanels>(from + p * inner * kLmuPanel, x, next + p * kLmuPanel, stride, inner);
  for (; p < panels; ++p)
    multiply<kRows, 1>(from + p * inner * kLmuPanel, x, next + p * kLmuPanel, stride, inner);
}

using AdvanceFn = void (*)(const SelectiveScanLmu&, const float*, float*, int64_t);
constexpr AdvanceFn kAdvance[kLmuRows] = {advance<1>, advance<2>, advance<3>,
                                          advance<4>, advance<5>, advance<6>};

void scan_rows(const SelectiveScanLmu& args, int64_t begin, int64_t end, float* scratch) {
  const SelectiveScanLmu a = args;
  const int64_t rows = end - begin, state = a.state;
  const int64_t stride = a.panels() * kLmuPanel + a.chunk + 16;
  const AdvanceFn step = kAdvance[rows - 1];
  float* m = scratch;  // [row][memory, then the step's inputs]
  float* next = m + kLmuRows * stride;
  const auto snapshot = [&](int64_t k) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (begin + r) / a.dim * a.num_snapshots + k;
      store_row(a.snapshots + (at * a.dim + (begin + r) % a.dim) * state, m + r * stride, 1, state);
    }
  };
  for (int64_t r = 0; r < rows; ++r) {
    if (a.initial_state != nullptr)
      load_row(m + r * stride, a.initial_state + (begin + r) * state, 1, state);
    else
      std::memset(m + r * stride, 0, static_cast<size_t>(state) * sizeof(float));
  }
  for (int64_t k = a.length; k < a.num_snapshots; ++k) snapshot(k);
  for (int64_t t = 0; t < a.length; t += a.chunk) {
    for (int64_t r = 0; r < rows; ++r)
      load_row(m + r * stride + state, a.u.data, a.u.type,
               (begin + r) / a.dim * a.u.batch + (begin + r) % a.dim * a.u.channel + t * a.u.time,
               a.u.time, a.chunk);
    step(a, m, next, stride);
    float* const before = m;
    m = next;
    next = before;
    for (int64_t r = 0; a.memories != nullptr && r < rows; ++r)
      store_row(a.memories, a.u.type, ((begin + r) * a.length + t) * state, m + r * stride, 1,
                state);
    if (const int64_t left = a.length - t - a.chunk; left < a.num_snapshots) snapshot(left);
  }
  for (int64_t r = 0; r < rows; ++r)
    store_row(a.last_state + (begin + r) * state, m + r * stride, 1, state);
}

}  // namespace
}  // namespace effinfer
