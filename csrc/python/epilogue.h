// The epilogues by the names that Python gives them.
#pragma once
#include <string>

#include "ops/linear/linear.h"
#include "python/tensor.h"

namespace effinfer {

inline Epilogue epilogue_named(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"none", "silu", "gelu", "gelu_tanh", "silu_mul", "gelu_mul"};
  for (int i = 0; i < 6; ++i)
    if (name == kNames[i]) return static_cast<Epilogue>(i);
  reject(op, "epilogue", "be a known one", "'" + name + "'");  // the Python layer lists them
}

}  // namespace effinfer
