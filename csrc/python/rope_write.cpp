#include "ops/rope_write/rope_write.h"

#include "python/pages.h"
#include "python/tensor.h"

namespace effinfer::rope_write_binding {

constexpr auto kOp = "rope_write";

WrittenPages written(const PageTensor& p) {
  return {p.tensor.data, p.dim,         p.plane_stride, p.block_stride,
          p.slot_stride, p.head_stride, p.dim_stride,   p.tensor.dtype()};
}

// Two rows that write one slot would depend on their order. A table of those seen so far, by open
// addressing.
void refuse_repeated_slots(const RopeWrite& a) {
  if (a.rows < 2) return;
  int64_t size = 4;
  while (size < 2 * a.rows) size *= 2;
  auto* const seen = static_cast<int64_t*>(workspace(static_cast<size_t>(size) * sizeof(int64_t)));
  for (int64_t i = 0; i < size; ++i) seen[i] = -1;
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.slot[row] < 0) continue;
    const int64_t plane = a.plane != nullptr ? a.plane[row] : 0;
    const int64_t key = plane * a.blocks * a.block_size + a.slot[row];
    int64_t at = key & (size - 1);
    for (; seen[at] >= 0; at = (at + 1) & (size - 1))
      if (seen[at] == key)
        reject(kOp, "slot", "not repeat a slot of a plane", std::to_string(a.slot[row]));
    seen[at] = key;
  }
}

// cos or sin: lines of rotary_dim, or null.
Rows want_lines(const char* arg, py::handle object, int64_t lines, int64_t dim) {
  const Rows r = want_rows(kOp, arg, object, kF32, lines, dim, true);
  if (r && r.tensor.ndim != 2) reject(kOp, arg, "have 2 dimensions", shape_text(r.tensor));
  return r;
}

void run(py::handle qkv_, py::handle cos_, py::handle sin_, py::handle k_pages_,
         py::handle v_pages_, py::handle slot_, py::handle position_, py::handle plane_,
         int64_t q_heads, int64_t kv_heads, bool interleaved) {
  const PageTensor k = want_key_pages(kOp, k_pages_);
  const PageTensor v = want_value_pages(kOp, v_pages_, k);
  want_writable(kOp, "k_pages", k.tensor);
  want_writable(kOp, "v_pages", v.tensor);
  if (kv_heads != k.kv_heads)
    reject(kOp, "kv_heads", "be k_pages' " + std::to_string(k.kv_heads), std::to_string(kv_heads));
  const Tensor qkv = want(kOp, "qkv", qkv_, kFloats, {kAny, kAny});
  const int64_t rows = qkv.shape[0], width = qkv.shape[1];
  const int64_t rest = width - kv_heads * (k.dim + v.dim);
  if (q_heads < 0 || rest < 0 || rest % k.dim != 0 || rest / k.dim != q_heads)
    reject(kOp, "qkv",
           "have rows of (q_heads + kv_heads) * " + std::to_string(k.dim) + " + kv_heads * " +
               std::to_string(v.dim) + " elements for " + std::to_string(q_heads) + " and " +
               std::to_string(kv_heads) + " heads",
           shape_text(qkv));
  if (qkv.stride[1] != 1)
    reject(kOp, "qkv", "be contiguous in its last dimension", "strides of another kind");
  want_writable(kOp, "qkv", qkv);
  const Tensor position = want_optional(kOp, "position", position_, kI32, {rows});
  const Rows cos = want_lines("cos", cos_, position ? kAny : rows, kAny);
  if (cos.tensor && (cos.dim % 2 != 0 || cos.dim > k.dim))
    reject(kOp, "cos", "have an even number of columns, at most " + std::to_string(k.dim),
           shape_text(cos.tensor));
  const Rows sin = want_lines("sin", sin_, cos.rows, cos.dim);
  if (static_cast<bool>(cos) != static_cast<bool>(sin))
    reject(kOp, "sin", "be given exactly where cos is", sin ? "sin alone" : "cos alone");
  const auto* const lines = position.as<const int32_t>();
  want_numbers(kOp, "position", position_, rows, cos.rows,
               [&](int64_t row) { return cos && lines[row] >= 0; });
  const Tensor slot = want(kOp, "slot", slot_, kI32, {rows});
  const auto* const slots = slot.as<const int32_t>();
  const auto writes = [slots](int64_t row) { return slots[row] >= 0; };
  want_numbers(kOp, "slot", slot_, rows, k.blocks * k.block_size, writes);
  const Tensor plane = want_numbers(kOp, "plane", plane_, rows, k.planes, writes);
  const RopeWrite args = {
      .qkv = qkv.data,
      .cos = cos.tensor.as<const float>(),
      .sin = sin.tensor.as<const float>(),
      .position = lines,
      .slot = slots,
      .plane = plane.as<const int32_t>(),
      .k = written(k),
      .v = written(v),
      .rows = rows,
      .q_heads = q_heads,
      .kv_heads = kv_heads,
      .rotary_dim = cos.dim,
      .lines = cos.rows,
      .planes = k.planes,
      .blocks = k.blocks,
      .block_size = k.block_size,
      .qkv_row = qkv.stride[0],
      .cos_row = cos.stride,
      .sin_row = sin.stride,
      .type = qkv.dtype(),
      .interleaved = interleaved,
  };
  if (kIndicesReadable) refuse_repeated_slots(args);
  RUN(rope_write, args, qkv);
}

void bind(Module& m) { m.def<&run>("rope_write"); }

}  // namespace effinfer::rope_write_binding
