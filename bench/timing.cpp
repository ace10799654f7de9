#include "timing.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace effinfer::bench {

double median_seconds(const std::function<void()>& run, double budget) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  run();  // warm caches and pages
  auto start = Clock::now();
  run();
  const double once = std::max(since(start), 1e-9);
  // A sample lasts 20 us or more, so that reading the clock doesn't show.
  const auto per_sample = static_cast<int>(std::clamp(20e-6 / once, 1.0, 1e4));
  const auto samples = static_cast<int>(std::clamp(budget / (once * per_sample), 5.0, 2000.0));
  std::vector<double> seconds;
  for (int s = 0; s < samples; ++s) {
    start = Clock::now();
    for (int i = 0; i < per_sample; ++i) run();
    seconds.push_back(since(start) / per_sample);
  }
  std::nth_element(seconds.begin(), seconds.begin() + samples / 2, seconds.end());
  return seconds[samples / 2];
}

}  // namespace effinfer::bench
