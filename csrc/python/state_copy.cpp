#include "ops/state_copy/state_copy.h"

#include <algorithm>
#include <vector>

#include "python/checks.h"
#include "python/tensor.h"

namespace effinfer::state_copy_binding {

constexpr auto kOp = "state_copy";

// Bytes [first, last) that a pool may touch.
struct Extent {
  const char *first, *last;
};
Extent extent(const Tensor& t) {
  int64_t low = 0, high = t.element_size;
  for (int i = 0; i < t.ndim; ++i) {
    const int64_t reach = (t.shape[i] - 1) * t.stride[i] * t.element_size;
    (reach < 0 ? low : high) += reach;
  }
  const auto* data = static_cast<const char*>(t.data);
  return {data + low, data + high};
}

// In one pool, a slot may not be both read and written (except by itself).
void refuse_overlap(const Tensor& dst, const Tensor& src, const int32_t* to, const int32_t* from,
                    int64_t count) {
  const Extent d = extent(dst), s = extent(src);
  if (dst.numel() == 0 || src.numel() == 0 || d.last <= s.first || s.last <= d.first) return;
  const bool same = dst.data == src.data && dst.shape[0] == src.shape[0] &&
                    std::equal(dst.stride, dst.stride + dst.ndim, src.stride);
  if (!same) reject(kOp, "src", "be dst itself or not overlap it", "a partly overlapping view");
  if (!kIndicesReadable) return;
  std::vector<int32_t> written;
  for (int64_t i = 0; i < count; ++i)
    if (to[i] >= 0 && from[i] >= 0 && to[i] != from[i]) written.push_back(to[i]);
  std::sort(written.begin(), written.end());
  for (int64_t i = 0; i < count; ++i)
    if (to[i] >= 0 && from[i] >= 0 && std::binary_search(written.begin(), written.end(), from[i]))
      reject(kOp, "src_indices", "not name a slot of the same pool that is written",
             "slot " + std::to_string(from[i]));
}

void run(py::handle dst_, py::handle to_, py::handle src_, py::handle from_) {
  const Tensor dst = want(kOp, "dst", dst_, kAnyType);
  const Tensor src = want(kOp, "src", src_, kAnyType);
  want_writable(kOp, "dst", dst);
  if (!dst_.attr("dtype").is(src_.attr("dtype")))
    reject(kOp, "src", "have dst's dtype " + std::string(py::str(dst_.attr("dtype"))),
           std::string(py::str(src_.attr("dtype"))));
  if (dst.ndim != src.ndim || !std::equal(dst.shape + 1, dst.shape + dst.ndim, src.shape + 1))
    reject(kOp, "src", "hold states like dst's " + shape_text(dst), shape_text(src));
  const int64_t count = want(kOp, "dst_indices", to_, kI32, {kAny}).shape[0];
  const Tensor to = want_slots(kOp, "dst_indices", to_, count, dst.shape[0]);
  want(kOp, "src_indices", from_, kI32, {count});  // not optional, as want_slots() takes it
  const Tensor from = want_slots(kOp, "src_indices", from_, count, src.shape[0], false);
  refuse_overlap(dst, src, to.as<const int32_t>(), from.as<const int32_t>(), count);
  const int64_t element = dst.element_size;
  StateCopy args = {
      .dst = dst.data,
      .src = src.data,
      .dst_slots = to.as<const int32_t>(),
      .src_slots = from.as<const int32_t>(),
      .count = count,
      .dst_pool = dst.shape[0],
      .src_pool = src.shape[0],
      .dst_slot = dst.stride[0] * element,
      .src_slot = src.stride[0] * element,
      .run = element,
      .size = {1, 1, 1, 1, 1},
      .dst_stride = {},
      .src_stride = {},
  };
  int inner = dst.ndim - 1;  // merge the innermost dimensions that are dense in both
  for (; inner > 0 && dst.stride[inner] * element == args.run &&
         src.stride[inner] * element == args.run;
       --inner)
    args.run *= dst.shape[inner];
  for (int i = inner, at = kStateDims - 1; i > 0; --i, --at) {
    args.size[at] = dst.shape[i];
    args.dst_stride[at] = dst.stride[i] * element;
    args.src_stride[at] = src.stride[i] * element;
  }
  RUN(state_copy, args, dst);
}

void bind(Module& m) { m.def<&run>("state_copy"); }

}  // namespace effinfer::state_copy_binding
