#include "engine/config.h"

#include "engine/errors.h"

namespace effinfer::engine {
namespace {

void at_least(const char* arg, int value, int lowest) {
  if (value < lowest)
    reject("Scheduler", arg, "be at least " + std::to_string(lowest), std::to_string(value));
}

void want_costs(const char* arg, const std::vector<double>& costs, int rows) {
  if (static_cast<int>(costs.size()) != rows)
    reject("Scheduler", arg, "have max_rows = " + std::to_string(rows) + " entries",
           std::to_string(costs.size()));
  for (const double cost : costs)
    if (!(cost >= 0)) reject("Scheduler", arg, "hold seconds >= 0", std::to_string(cost));
}

}  // namespace

void validate(const Config& c) {
  constexpr auto op = "Scheduler";
  at_least("loops", c.loops, 1);
  if (c.loops > 64) reject(op, "loops", "be at most 64", std::to_string(c.loops));
  at_least("r_min", c.r_min, 1);
  if (c.r_min > c.loops)
    reject(op, "r_min", "be at most loops = " + std::to_string(c.loops), std::to_string(c.r_min));
  at_least("max_slots", c.max_slots, 1);
  at_least("max_rows", c.max_rows, 1);
  at_least("prefill_chunk", c.prefill_chunk, 1);
  at_least("block_size", c.block_size, 1);
  at_least("max_positions", c.max_positions, 1);
  at_least("num_blocks", c.num_blocks, c.has_kv ? 1 : 0);
  at_least("num_states", c.num_states, c.has_kv ? 0 : 1);
  if (c.has_state()) at_least("num_states", c.num_states, c.states_per_request());
  at_least("max_ngram", c.max_ngram, 0);
  if (c.max_ngram > 0 && c.loops != 1)
    reject(op, "max_ngram", "be 0 when loops > 1", std::to_string(c.max_ngram));
  if (c.drafts() || !c.costs.empty()) want_costs("costs", c.costs, c.max_rows);
  if (!c.head_costs.empty()) want_costs("head_costs", c.head_costs, c.max_rows);
}

}  // namespace effinfer::engine
