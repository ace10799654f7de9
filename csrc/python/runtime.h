// What the module offers beside the ops: instruction sets, threads, version.
#pragma once
#include "python/module.h"

namespace effinfer {
void bind_runtime(Module& m);
}
