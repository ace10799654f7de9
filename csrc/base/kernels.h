// Every op and the kernel it would run: what `effinfer info`, isa() and effinfer-bench print.
#pragma once
#include <span>

namespace effinfer {

struct OpKernel {
  const char* name;
  const char* (*isa)();
};

std::span<const OpKernel> op_kernels();  // generated from the list in csrc/CMakeLists.txt

}  // namespace effinfer
