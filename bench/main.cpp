#include <cstdio>

#include "base/kernels.h"

int main() {
  for (const auto& op : effinfer::op_kernels()) std::printf("%s %s\n", op.name, op.isa());
}
