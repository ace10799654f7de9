// A small pool of our own, for programs without torch (effinfer-bench, native tests).
#pragma once
#include "base/parallel.h"

namespace effinfer {

// Starts threads - 1 workers (the caller is the last one) and returns the pool to give to set_pool.
// Calling it again changes the number of threads.
const Pool* thread_pool(int threads);

}  // namespace effinfer
