// Checks of index arguments that several ops take. Their values are read only where they lie in
// host memory: the CUDA module checks shape and type, and its kernels skip what is out of range.
#pragma once
#include <cstring>

#include "python/tensor.h"

namespace effinfer {

#if defined(EFFINFER_CUDA_MODULE) && !defined(EFFINFER_CUDA_SHIM)
constexpr bool kIndicesReadable = false;
#else
constexpr bool kIndicesReadable = true;
#endif

// cu_seqlens: S + 1 positions that rise from 0 to `total` (equal neighbours: an empty sequence).
inline Tensor want_cu_seqlens(const char* op, py::handle object, int64_t total) {
  const Tensor t = want_optional(op, "cu_seqlens", object, kI32, {kAny});
  if (!t) return t;
  if (t.shape[0] < 1) reject(op, "cu_seqlens", "have at least 1 element", "0");
  if (!t.is_contiguous()) reject(op, "cu_seqlens", "be contiguous", "a strided view");
  if (!kIndicesReadable) return t;
  const auto* at = t.as<const int32_t>();
  const int64_t last = t.shape[0] - 1;
  if (at[0] != 0) reject(op, "cu_seqlens", "start at 0", std::to_string(at[0]));
  for (int64_t i = 0; i < last; ++i)
    if (at[i + 1] < at[i])
      reject(op, "cu_seqlens", "never fall",
             std::to_string(at[i]) + " then " + std::to_string(at[i + 1]));
  if (at[last] != total)
    reject(op, "cu_seqlens", "end at the length " + std::to_string(total),
           std::to_string(at[last]));
  return t;
}

// State slots, one per batch row: each -1 (skip) or in [0, slots), and none twice where they are
// written, because two rows that update one slot would depend on their order.
inline Tensor want_slots(const char* op, const char* arg, py::handle object, int64_t batch,
                         int64_t slots, bool unique = true) {
  const Tensor t = want_optional(op, arg, object, kI32, {batch});
  if (!t || batch == 0) return t;
  if (!t.is_contiguous()) reject(op, arg, "be contiguous", "a strided view");
  if (!kIndicesReadable) return t;
  const auto* at = t.as<const int32_t>();
  for (int64_t i = 0; i < batch; ++i)
    if (at[i] < -1 || at[i] >= slots)
      reject(op, arg, "be -1 or in [0, " + std::to_string(slots) + ")", std::to_string(at[i]));
  if (batch == 1 || !unique) return t;
  const size_t words = static_cast<size_t>(slots + 63) / 64;
  auto* seen = static_cast<uint64_t*>(workspace(words * 8));
  std::memset(seen, 0, words * 8);
  for (int64_t i = 0; i < batch; ++i) {
    if (at[i] < 0) continue;
    const uint64_t bit = uint64_t{1} << (at[i] & 63);
    if (seen[at[i] >> 6] & bit) reject(op, arg, "not repeat a slot", std::to_string(at[i]));
    seen[at[i] >> 6] |= bit;
  }
  return t;
}

}  // namespace effinfer
