#include "python/runtime.h"

#include <cstdlib>
#include <string>

#include "base/cpu.h"
#include "base/kernels.h"
#include "base/parallel.h"
#include "python/tensor.h"

namespace effinfer {
namespace {

// The Python layer's own pool, lent as addresses of C functions: nothing here links it.
int (*g_parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
int (*g_get_num_threads)(uint32_t*);

constexpr Pool kLentPool = {
    [](int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
      g_parallel_for(0, n, 1, body, ctx);
    },
    [] {
      uint32_t n = 1;
      g_get_num_threads(&n);
      return static_cast<int>(n);
    },
};

void use_pool(uintptr_t parallel_for, uintptr_t get_num_threads) {
  g_parallel_for = reinterpret_cast<decltype(g_parallel_for)>(parallel_for);
  g_get_num_threads = reinterpret_cast<decltype(g_get_num_threads)>(get_num_threads);
  set_pool(&kLentPool);
}

void cap_isa(const std::string& name) {
  if (!set_isa_cap(name.c_str()))
    throw py::value_error(
        "set_isa: unknown instruction set '" + name +
        "' (known: scalar, avx2, avx512, avx512vnni, neon, dotprod, i8mm, or '' for no cap)");
}

py::dict kernels() {
  py::dict table;
  for (const OpKernel& op : op_kernels()) table[op.name] = op.isa();
  return table;
}

}  // namespace

void bind_runtime(Module& m) {
  if (const char* name = isa_env_error())
    throw py::value_error(std::string("EFFINFER_ISA: unknown instruction set '") + name +
                          "' (known: scalar, avx2, avx512, avx512vnni, neon, dotprod, i8mm)");
  m.attr("__version__") = EFFINFER_VERSION;
  m.def<&isa_name>("isa");
  m.def<&cap_isa>("set_isa");
  m.def<&kernels>("kernels");
  m.def<&num_threads>("num_threads");
  m.def<&set_num_threads>("set_num_threads");
  m.def<&use_pool>("use_pool");
  m.def<&use_tensor_type>("use_tensor_type");
}

}  // namespace effinfer
