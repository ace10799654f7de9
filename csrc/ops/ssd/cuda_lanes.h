// How a GPU spreads a row of a head's state over threads, in a step and in a scan token by token:
// y is summed within a thread and then across, so the same spread gives the same bits.
#pragma once
#include "base/dtype.h"

namespace effinfer {

constexpr int64_t kSsdFewStates = 16;    // up to here kSsdFewLanes threads
constexpr int64_t kSsdManyStates = 256;  // up to here kSsdLanes, above kSsdMostLanes
constexpr int kSsdFewLanes = 4, kSsdLanes = 16, kSsdMostLanes = 32;

}  // namespace effinfer
