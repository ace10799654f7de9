// Counting on Arm: eor, cnt and add per 16 outputs and eight k.
#include "ops/binary_linear/generic.h"

namespace effinfer {
namespace {

// Adds the bytes of `sum` to the 16 32-bit counts at `counts`.
EFFINFER_INLINE void flush(uint8x16_t sum, int32_t* counts) {
  const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(sum)), vmovl_high_u8(sum)};
  auto* const at = reinterpret_cast<uint32_t*>(counts);
  EFFINFER_UNROLL
  for (int h = 0; h < 2; ++h) {
    uint32_t* const to = at + 8 * h;
    vst1q_u32(to, vaddw_u16(vld1q_u32(to), vget_low_u16(halves[h])));
    vst1q_u32(to + 4, vaddw_high_u16(vld1q_u32(to + 4), halves[h]));
  }
}

// R rows of x against P panels.
template <int R, int P>
void count_tile(const CountTask& t, int64_t row, int64_t panel) {
  constexpr int V = 2 * P;  // registers of 16 outputs
  const int64_t x_stride = t.x_stride, panel_stride = t.panel_stride, bytes = t.bytes;
  const int64_t part = t.rows * kPart;
  const uint8_t* w = t.weight + panel * panel_stride;
  const uint8_t* x = t.x + row * x_stride;
  int32_t* const counts = t.counts + 2 * panel * part + row * kPart;
  for (int p = 0; p < V; ++p)
    for (int64_t i = 0; i < R * kPart; ++i) counts[p * part + i] = 0;
  for (int64_t begin = 0; begin < bytes; begin += kFlush) {
    uint8x16_t sum[R][V] = {};
    const uint8_t* const end = x + (bytes - begin < kFlush ? bytes - begin : kFlush);
    for (; x < end; ++x, w += kOutputs) {
      uint8x16_t outputs[V];
      EFFINFER_UNROLL
      for (int v = 0; v < V; ++v) outputs[v] = vld1q_u8(w + v / 2 * panel_stride + v % 2 * kPart);
      EFFINFER_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint8x16_t eight = vld1q_dup_u8(x + r * x_stride);
        EFFINFER_UNROLL
        for (int v = 0; v < V; ++v)
          sum[r][v] = vaddq_u8(sum[r][v], vcntq_u8(veorq_u8(eight, outputs[v])));
      }
    }
    EFFINFER_UNROLL
    for (int r = 0; r < R; ++r) {
      EFFINFER_UNROLL
      for (int v = 0; v < V; ++v) flush(sum[r][v], counts + v * part + r * kPart);
    }
  }
}

// Every row against P panels, R rows at a time and the rest together.
template <int R, int P>
void count_rows(const CountTask& t, int64_t row, int64_t panel) {
  for (; t.rows - row >= R; row += R) count_tile<R, P>(t, row, panel);
  if constexpr (R > 1) {
    if (row < t.rows) count_rows<R - 1, P>(t, row, panel);
  }
}

}  // namespace

void binary_signs_neon(const SignRows& a) { signs(a); }

void binary_count_neon(const CountTask& t) {
  int64_t panel = 0;
  for (; t.panels - panel >= 2; panel += 2) count_rows<4, 2>(t, 0, panel);
  if (panel < t.panels) count_rows<4, 1>(t, 0, panel);
}

void binary_finish_neon(const FinishTask& t) { finish_counts(t); }

}  // namespace effinfer
