// The epilogues' activations, one element at a time: the definition.
#pragma once
#include "base/scalar.h"
#include "ops/linear/linear.h"

namespace effinfer::scalar {

inline float gelu(float x) { return 0.5f * x * (1.f + std::erf(x * 0.70710678f)); }
inline float gelu_tanh(float x) {
  return x / (1.f + std::exp(-1.5957691216f * x * (1.f + 0.044715f * x * x)));
}

inline float activate(Epilogue e, float x) {
  switch (e) {
    case Epilogue::none:
      return x;
    case Epilogue::silu:
    case Epilogue::silu_mul:
      return silu(x);
    case Epilogue::gelu:
    case Epilogue::gelu_mul:
      return gelu(x);
    case Epilogue::gelu_tanh:
      return gelu_tanh(x);
  }
  return x;
}

}  // namespace effinfer::scalar
