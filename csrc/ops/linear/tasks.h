// How a linear layer's output is cut into tasks, and who runs them: shared by the ops that multiply
// by packed weights of any kind.
#pragma once
#include <algorithm>
#include <atomic>

#include "base/parallel.h"
#include "ops/linear/linear.h"

namespace effinfer {

// Tasks of `rows` x `panels` each at most, the rows of one panel group together, so that those
// weights are read from memory once.
struct LinearCut {
  int64_t rows, panels;            // of one task, at most
  int64_t row_parts, panel_parts;  // tasks
  int64_t x_blocks;                // of k, copied at a time
};

LinearCut linear_cut(const Linear& args);
int64_t linear_scratch_per_slot(const Linear& args, const LinearCut& cut);  // floats

// Halves c.panels until every thread has work, and counts the tasks.
void share_panels(const Linear& args, LinearCut& c);

// Runs run(task) for each task on a.slots threads, with `per_slot` floats of a.scratch each.
template <class Run>
void linear_tasks(const Linear& a, const LinearCut& c, int64_t per_slot, Run&& run) {
  constexpr int64_t kWorthThreads = 1
                                    << 18;  // multiply-adds: under about 10 us a thread costs more
  using linear_layout::kPanel;
  const int64_t tasks = c.row_parts * c.panel_parts, all = linear_layout::panels(a);
  std::atomic<int64_t> next{0};
  // The chunk is a slot, and slots claim tasks: what a thread may write is its chunk's, whatever
  // the number of threads has become since the scratch was sized.
  auto work = [&](int64_t slot, int64_t) {
    float* scratch = a.scratch + slot * per_slot;
    for (int64_t t = next++; t < tasks; t = next++) {
      const int64_t row = t % c.row_parts * c.rows, panel = t / c.row_parts * c.panels;
      run(LinearTask{row, std::min(c.rows, a.rows - row), panel, std::min(c.panels, all - panel),
                     c.x_blocks, scratch});
    }
  };
  const bool small = a.rows * all * kPanel * a.k < kWorthThreads;
  if (small || a.slots <= 1)
    work(0, 0);
  else
    parallel_for(std::min(a.slots, tasks), work);
}

}  // namespace effinfer
