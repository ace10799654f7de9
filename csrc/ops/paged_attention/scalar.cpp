// The definition, one row and query head at a time.
#include "base/scalar.h"

#include <algorithm>
#include <limits>

#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

struct Row {
  const PagedAttention& a;
  int64_t row, q_head, kv_head;

  // Where the page of position t keeps this head's vector.
  int64_t at(const PageStrides& s, int64_t t) const {
    const int64_t block = a.block_table[a.sequence[row] * a.table_row + t / a.block_size];
    const int64_t plane = a.plane != nullptr ? a.plane[row] : 0;
    return plane * s.plane + block * s.block + t % a.block_size * s.slot + kv_head * s.head;
  }

  float score(int64_t t) const {
    const int64_t q = row * a.q_row + q_head * a.q_head, k = at(a.k_stride, t);
    float dot = 0.f;
    for (int64_t d = 0; d < a.k_dim; ++d)
      dot += scalar::get(a.q, a.q_type, q + d) *
             scalar::get(a.k_pages, a.k_type, k + d * a.k_stride.dim);
    const float x = dot * a.scale;
    return a.softcap > 0.f ? a.softcap * std::tanh(x / a.softcap) : x;
  }

  void attend(float* out) const {
    float weights[kAttentionBlock], sum = 0.f, top = -std::numeric_limits<float>::infinity();
    std::fill_n(out, a.v_dim, 0.f);
    const int64_t last = a.position[row];
    for (int64_t t = first_key(a, last); t <= last;) {
      const int64_t end = std::min(last + 1, round_up(t + 1, kAttentionBlock)), count = end - t;
      float block_top = top;
      for (int64_t j = 0; j < count; ++j) {
        weights[j] = score(t + j);
        block_top = std::max(block_top, weights[j]);
      }
      const float factor = std::exp(top - block_top);
      top = block_top;
      sum *= factor;
      for (int64_t j = 0; j < count; ++j) sum += weights[j] = std::exp(weights[j] - top);
      int64_t values[kAttentionBlock];
      for (int64_t j = 0; j < count; ++j) values[j] = at(a.v_stride, t + j);
      for (int64_t d = 0; d < a.v_dim; ++d) {
        float block_sum = 0.f;
        for (int64_t j = 0; j < count; ++j)
          block_sum += weights[j] * scalar::get(a.v_pages, a.v_type, values[j] + d);
        out[d] = out[d] * factor + block_sum;
      }
      t = end;
    }
    const int64_t to = row * a.out_row + q_head * a.out_head;
    for (int64_t d = 0; d < a.v_dim; ++d) scalar::put(a.out, a.q_type, to + d, out[d] / sum);
  }
};

}  // namespace

void paged_attention_scalar(const PagedAttention& a, const AttentionTask& task, float* scratch) {
  const int64_t group = queries_per_row(a);
  for (int64_t row = task.row; row < task.row + task.rows; ++row)
    for (int64_t h = task.kv_head * group; h < (task.kv_head + task.kv_heads) * group; ++h)
      Row{a, row, h, h / group}.attend(scratch);
}

}  // namespace effinfer
