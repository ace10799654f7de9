#include <cstring>

#include "base/scalar.h"
#include "bench.h"

namespace effinfer::bench {
namespace {

std::vector<Op>& ops() {
  static std::vector<Op> list;
  return list;
}

}  // namespace

Registration::Registration(const char* op, std::vector<Case> (*cases)()) {
  ops().push_back({op, cases});
}

const std::vector<Op>& registered() { return ops(); }

std::shared_ptr<void> values(int64_t n, DType type, float lo, float hi) {
  const size_t bytes = (static_cast<size_t>(n * size_of(type)) + 63) / 64 * 64 + 64;
  std::shared_ptr<void> buffer(std::aligned_alloc(64, bytes), std::free);
  std::memset(buffer.get(), 0, bytes);
  uint32_t state = 12345;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const float x = lo + (hi - lo) * static_cast<float>(state >> 8) * 0x1p-24f;
    switch (type) {
      case DType::f32:
        scalar::put(static_cast<float*>(buffer.get()) + i, x);
        break;
      case DType::bf16:
        scalar::put(static_cast<bf16*>(buffer.get()) + i, x);
        break;
      case DType::f16:
        scalar::put(static_cast<f16*>(buffer.get()) + i, x);
        break;
    }
  }
  return buffer;
}

}  // namespace effinfer::bench
