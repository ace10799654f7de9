// ssd_state_update over vec.h: rows of the state in blocks of kLanes, N along the lanes.
#include "ops/scan/rows.h"
#include "ops/ssd/step.h"
#include "ops/ssd_state_update/ssd_state_update.h"

namespace effinfer {
namespace {

// n <= kLanes elements of any type; the other lanes are zero.
Vec load_any(const void* data, DType type, int64_t offset, int64_t stride, int64_t n) {
  float values[kLanes];
  load_row(values, data, type, offset, stride, n);
  return load(values);
}

class RowUpdate {
 public:
  RowUpdate(const SsdStateUpdate& args, int64_t row) : a(args), row_(row) {}

  void run(int64_t head, float* state) {
    const int64_t P = a.head_dim, N = a.state_dim, group = head / (a.heads / a.groups);
    const float* const A = a.A + head * a.A_strides[0];
    const bool rates = a.A_strides[2] != 0;
    const bool one_decay = a.dt_strides[2] == 0 && a.A_strides[1] == 0 && !rates &&
                           (a.dt_bias == nullptr || a.dt_bias_strides[1] == 0);
    Vec step{}, decay{};
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t rows = least(kLanes, P - p);
      if (p == 0 || !one_decay) {
        step = decay = steps(head, p, rows);
        if (!rates) decay = exp(step * load_strided(A + p * a.A_strides[1], a.A_strides[1], rows));
      }
      const Vec x = signal(a.x, a.x_strides, head, p, rows), input = step * x;
      Vec y{};
      for (int64_t n = 0; n < N; n += kColumns) {
        hold(group, n);
        float* const S = state + p * a.state_strides[2] + n;
        const StepArgs args = {.from = S,
                               .to = S,
                               .from_stride = a.state_strides[2],
                               .to_stride = a.state_strides[2],
                               .N = least(kColumns, N - n),
                               .B = B_,
                               .C = C_,
                               .A = A + p * a.A_strides[1] + n,
                               .A_stride = a.A_strides[1]};
        y = y + (rates ? step_rows<true>(args, rows, decay, input)
                       : step_rows<false>(args, rows, decay, input));
      }
      if (a.D != nullptr)
        y = fma(
            load_strided(a.D + head * a.D_strides[0] + p * a.D_strides[1], a.D_strides[1], rows), x,
            y);
      if (a.z != nullptr) y = y * silu(signal(a.z, a.z_strides, head, p, rows));
      put(head, p, rows, y);
    }
  }

  void skip(int64_t head) {
    for (int64_t p = 0; p < a.head_dim; p += kLanes)
      put(head, p, least(kLanes, a.head_dim - p), Vec{});
  }

 private:
  static constexpr int64_t kColumns = 512;

  Vec signal(const void* data, const int64_t* strides, int64_t head, int64_t p, int64_t n) const {
    return load_any(data, a.x_type, row_ * strides[0] + head * strides[1] + p * strides[2],
                    strides[2], n);
  }

  void put(int64_t head, int64_t p, int64_t n, Vec y) const {
    float values[kLanes];
    store(values, y);
    const int64_t* const strides = a.y_strides;
    store_row(a.y, a.x_type, row_ * strides[0] + head * strides[1] + p * strides[2], values,
              strides[2], n);
  }

  Vec steps(int64_t head, int64_t p, int64_t n) const {
    const int64_t* const strides = a.dt_strides;
    Vec d = load_any(a.dt, a.dt_type, row_ * strides[0] + head * strides[1] + p * strides[2],
                     strides[2], n);
    if (a.dt_bias != nullptr) {
      const int64_t stride = a.dt_bias_strides[1];
      d = d + load_strided(a.dt_bias + head * a.dt_bias_strides[0] + p * stride, stride, n);
    }
    if (a.dt_softplus) d = softplus(d);
    return min(splat(a.dt_max), max(splat(a.dt_min), d));  // NaN stays: the second operand
  }

  // B and C of a group, up to kColumns of them from column n, as float32 for all of its heads.
  void hold(int64_t group, int64_t n) {
    if (group == group_ && n == column_) return;
    const int64_t count = least(kColumns, a.state_dim - n);
    const auto offset = [&](const int64_t* strides) {
      return row_ * strides[0] + group * strides[1] + n * strides[2];
    };
    load_row(B_, a.B, a.B_type, offset(a.B_strides), a.B_strides[2], count);
    load_row(C_, a.C, a.B_type, offset(a.C_strides), a.C_strides[2], count);
    group_ = group;
    column_ = n;
  }

  const SsdStateUpdate& a;
  const int64_t row_;
  int64_t group_ = -1, column_ = -1;
  float B_[kColumns], C_[kColumns];
};

void update_heads(const SsdStateUpdate& a, int64_t row, int64_t head_begin, int64_t head_end) {
  const int64_t slot = a.state_indices != nullptr ? a.state_indices[row] : row;
  RowUpdate update(a, row);
  for (int64_t head = head_begin; head < head_end; ++head) {
    if (slot < 0)
      update.skip(head);
    else
      update.run(head, a.state + slot * a.state_strides[0] + head * a.state_strides[1]);
  }
}

}  // namespace
}  // namespace effinfer
