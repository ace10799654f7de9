// Arguments that say which part of a tensor an op works on: packed sequences and state slots.
// Their values are checked where they lie in memory this process can read; on a GPU, where reading
// them would stall the stream, kernels skip what is out of range.
#pragma once
#include <algorithm>
#include <vector>

#include "python/tensor.h"

namespace effinfer {

#if defined(EFFINFER_CUDA_MODULE) && !defined(EFFINFER_CUDA_SHIM)
constexpr bool kValuesReadable = false;
#else
constexpr bool kValuesReadable = true;
#endif

// Dense int32 offsets (S + 1,), from 0 to `length`, never falling; None gives a null tensor.
inline Tensor want_cu_seqlens(const char* op, py::handle object, int64_t length) {
  const Tensor t = want_optional(op, "cu_seqlens", object, kI32, {kAny});
  if (!t) return t;
  if (!t.is_contiguous()) reject(op, "cu_seqlens", "be contiguous", "a strided view");
  const int64_t n = t.shape[0];
  if (n < 1) reject(op, "cu_seqlens", "have at least one element", "none");
  if (!kValuesReadable) return t;
  const auto* offsets = t.as<const int32_t>();
  if (offsets[0] != 0) reject(op, "cu_seqlens", "start at 0", std::to_string(offsets[0]));
  for (int64_t i = 1; i < n; ++i)
    if (offsets[i] < offsets[i - 1])
      reject(op, "cu_seqlens", "never fall",
             std::to_string(offsets[i - 1]) + " before " + std::to_string(offsets[i]));
  if (offsets[n - 1] != length)
    reject(op, "cu_seqlens", "end at the length " + std::to_string(length),
           std::to_string(offsets[n - 1]));
  return t;
}

// Dense int32 indices (count,) into `slots` rows, -1 meaning skip; `unique` refuses a repeated
// slot. None gives a null tensor.
inline Tensor want_slots(const char* op, const char* arg, py::handle object, int64_t count,
                         int64_t slots, bool unique = true) {
  const Tensor t = want_optional(op, arg, object, kI32, {count});
  if (!t) return t;
  if (!t.is_contiguous()) reject(op, arg, "be contiguous", "a strided view");
  if (!kValuesReadable) return t;
  const auto* index = t.as<const int32_t>();
  for (int64_t i = 0; i < t.shape[0]; ++i)
    if (index[i] < -1 || index[i] >= slots)
      reject(op, arg, "hold -1 or a slot below " + std::to_string(slots), std::to_string(index[i]));
  if (!unique || t.shape[0] < 2) return t;
  std::vector<int32_t> sorted(index, index + t.shape[0]);
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i] >= 0 && sorted[i] == sorted[i - 1])
      reject(op, arg, "not repeat a slot", "slot " + std::to_string(sorted[i]) + " twice");
  return t;
}

}  // namespace effinfer
