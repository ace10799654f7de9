// Medians of repeated runs.
#pragma once
#include <functional>

namespace effinfer::bench {

// Median seconds of one call, over calls that together take about `budget` seconds (at least 5).
double median_seconds(const std::function<void()>& run, double budget);

}  // namespace effinfer::bench
