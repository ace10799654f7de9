// What the module offers beside the ops: instruction sets, threads, version.
#pragma once
#include <pybind11/pybind11.h>

namespace effinfer {
void bind_runtime(pybind11::module_& m);
}
