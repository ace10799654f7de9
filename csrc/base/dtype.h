// Element types an op may be given. Arithmetic is always float32.
#pragma once
#include <cstdint>

namespace effinfer {

enum class DType : int8_t { f32, bf16, f16 };

// Storage only: 16 raw bits. Conversions live in vec.h (vectors) and scalar.h (one element).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

// Calls f(T{}) with the C++ type of `t`: the one place where run-time dtypes become template types.
// (constexpr, so that a GPU kernel may call it too.)
template <class F>
constexpr void with_type(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

}  // namespace effinfer
