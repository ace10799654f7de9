#include "engine/scheduler.h"

#include <algorithm>
#include <limits>
#include <set>

#include "engine/errors.h"

namespace effinfer::engine {

Scheduler::Scheduler(Config config)
    : config_((validate(config), std::move(config))),
      launch_(config_),
      blocks_(config_.has_kv ? config_.num_blocks : 0, config_.block_size),
      states_(config_.num_states),
      arena_(config_.loops > 1 ? config_.arena_rows() : 0),
      controller_(config_),
      trials_(config_.loops),
      on_line_(config_.max_slots),
      block_table_(size_t(config_.max_slots) * config_.max_blocks(), -1),
      line_ids_(config_.max_slots, -1),
      next_deadline_(std::numeric_limits<double>::infinity()),
      candidates_(drafts_rank() + 1) {
  stats_.depths.resize(config_.loops);
  stats_.rows_at_loop.resize(config_.loops);
  active_.reserve(config_.max_slots);
  for (int line = config_.max_slots - 1; line >= 0; --line) free_lines_.push_back(line);
  const size_t most = size_t(config_.max_slots) * (config_.chain_limit() + 1);
  for (auto& candidates : candidates_) candidates.reserve(most);
  wanting_.reserve(config_.max_rows);
}

uint64_t Scheduler::loops_on_line(int line) const {
  uint64_t loops = 0;
  if (const Request* request = on_line_[line])
    for (const Span& span : request->chain) loops |= uint64_t{1} << std::min(span.loop, 63);
  return loops;
}

const Tokens& Scheduler::history(int wanted, int* length) const {
  if (wanted < 0 || wanted >= launch_.wanted.count)
    reject("history", "i", "be below n_wanted = " + std::to_string(launch_.wanted.count),
           std::to_string(wanted));
  *length = launch_.wanted_positions.data[wanted] + 1;
  return on_line_[launch_.lines.data[launch_.wanted.data[wanted]]]->tokens;
}

void Scheduler::check() const {
  std::vector<int> block_refs(blocks_.size()), state_refs(states_.size());
  std::set<int> states;
  int rows = 0, lines = 0;
  for (size_t line = 0; line < on_line_.size(); ++line) {
    const Request* r = on_line_[line];
    invariant(line_ids_[line] == (r ? r->id : -1), "a line has another request's id");
    if (!r) continue;
    ++lines;
    invariant(r->line == static_cast<int>(line), "a request is on another's line");
    const int32_t* table = &block_table_[line * config_.max_blocks()];
    for (int b = 0; b < r->blocks; ++b) ++block_refs[table[b]];
    for (const int state : r->states) {
      ++state_refs[state];
      invariant(states.insert(state).second, "two requests own one state slot");
    }
    if (r->tail_shared) ++state_refs[r->tail];
    invariant(r->chain.size() <= size_t(config_.chain_limit()), "a chain is too long");
    invariant(r->known <= r->length && r->end <= r->length && r->length <= r->total,
              "a request has positions without tokens");
    int end = r->chain.empty() ? r->end : r->chain.front().first;
    int loop = config_.loops;
    for (const Span& span : r->chain) {
      invariant(span.first == end && span.length > 0, "a chain has a gap");
      invariant(span.loop <= loop && span.loop < config_.loops, "loops rise along a chain");
      end = span.end();
      loop = span.loop;
      if (config_.loops > 1) rows += span.length;
      if (span.in_shared) ++state_refs[span.state_in];
      if (span.out_shared) ++state_refs[span.state_out];
    }
    invariant(end == r->end, "a chain ends elsewhere than its request");
  }
  blocks_.check(block_refs);
  states_.check(state_refs);
  if (config_.loops > 1)
    invariant(arena_.free() + rows == config_.arena_rows(), "hidden rows are lost");
  invariant(lines == running() && free_lines_.size() + lines == on_line_.size(),
            "lines are miscounted");
  invariant(requests_.size() == size_t(lines) + queue_.size(), "a request is lost");
}

}  // namespace effinfer::engine
