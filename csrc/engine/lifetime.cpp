// A request's way from the queue to a line of the block table, and out.
#include <algorithm>

#include "engine/errors.h"
#include "engine/scheduler.h"

namespace effinfer::engine {

void Scheduler::submit(int64_t id, const int32_t* prompt, int64_t prompt_length,
                       int64_t max_new_tokens, std::vector<int32_t> stop_ids, int priority,
                       double deadline, int min_loops, int max_loops) {
  constexpr auto op = "submit";
  const auto number = [](auto value) { return std::to_string(value); };
  if (requests_.count(id)) reject(op, "request_id", "be new", number(id) + ", which is in use");
  if (prompt_length < 1) reject(op, "prompt", "have at least one token", "none");
  if (max_new_tokens < 1) reject(op, "max_new_tokens", "be at least 1", number(max_new_tokens));
  if (prompt_length > config_.max_positions ||
      max_new_tokens > config_.max_positions - prompt_length)
    reject(op, "prompt and max_new_tokens",
           "fit max_positions = " + number(config_.max_positions) + " together",
           number(prompt_length) + " and " + number(max_new_tokens));
  const int total = static_cast<int>(prompt_length + max_new_tokens);
  if (config_.has_kv && config_.blocks_for(total - 1) > blocks_.size())
    reject(op, "prompt and max_new_tokens",
           "fit all " + number(blocks_.size()) + " blocks of " + number(config_.block_size),
           number(prompt_length) + " and " + number(max_new_tokens));
  if (deadline != deadline) reject(op, "deadline", "be a number", "nan");
  const int least = config_.mode == Mode::exit ? config_.r_min : config_.loops;
  if (max_loops < least || max_loops > config_.loops)
    reject(op, "max_loops", "be in [" + number(least) + ", " + number(config_.loops) + "]",
           number(max_loops));
  if (min_loops < 1 || min_loops > max_loops)
    reject(op, "min_loops", "be in [1, max_loops = " + number(max_loops) + "]", number(min_loops));
  auto request = std::make_unique<Request>();
  request->id = id;
  request->tokens = Tokens(new int32_t[total]);
  std::copy_n(prompt, prompt_length, request->tokens.get());
  request->prompt = static_cast<int>(prompt_length);
  request->total = total;
  request->stop_ids = std::move(stop_ids);
  request->priority = priority;
  request->deadline = deadline;
  request->min_loops = std::max(min_loops, config_.r_min);
  request->max_loops = max_loops;
  next_deadline_ = std::min(next_deadline_, deadline);
  queue_.push(request.get());
  requests_.emplace(id, std::move(request));
  admissible_ = true;
  ++stats_.requests;
}

bool Scheduler::end(int64_t id, Event kind) {
  const auto found = requests_.find(id);
  if (found == requests_.end() || found->second->ending != kToken) return false;
  mark_ended(*found->second, kind);
  return true;
}

void Scheduler::mark_ended(Request& request, Event kind) {
  if (request.ending != kToken) return;
  request.ending = kind;
  ending_.push_back(&request);
}

void Scheduler::expire(double now) {
  for (Request* request : active_)
    if (request->deadline <= now) mark_ended(*request, kDeadline);
  if (next_deadline_ > now) return;
  next_deadline_ = std::numeric_limits<double>::infinity();
  for (Request* r = queue_.oldest(); r; r = RequestQueue::next(r)) {
    if (r->deadline <= now)
      mark_ended(*r, kDeadline);
    else
      next_deadline_ = std::min(next_deadline_, r->deadline);
  }
}

// What does not fit the events of this call waits for the next.
void Scheduler::deliver_endings() {
  auto& events = launch_.events;
  size_t done = 0;
  for (; done < ending_.size() && events.count < static_cast<int>(events.data.size()); ++done) {
    Request& request = *ending_[done];
    events.push({request.id, request.last_token, request.last_depth, request.ending});
    release(request);
    requests_.erase(request.id);
  }
  ending_.erase(ending_.begin(), ending_.begin() + done);
}

void Scheduler::admit() {
  if (!admissible_) return;
  admissible_ = false;
  while (!free_lines_.empty() && queue_.admit([this](Request* r) { return start(*r); })) {
  }
}

// Leading blocks of the prompt that are cached, at most `limit`; their ids are in the block table's
// next free line.
int Scheduler::matched_blocks(const Request& request, int limit) {
  int32_t* table = &block_table_[size_t(free_lines_.back()) * config_.max_blocks()];
  uint64_t prefix = 0;
  for (int b = 0; b < limit; ++b) {
    table[b] = blocks_.find(prefix, &request.tokens[size_t(b) * config_.block_size]);
    if (table[b] < 0) return b;
    prefix = blocks_.id(table[b]);
  }
  return limit;
}

// Gives the request all it can ever need, or nothing.
bool Scheduler::start(Request& r) {
  if (r.ending != kToken) return false;
  const Config& c = config_;
  const int line = free_lines_.back();
  int32_t* table = &block_table_[size_t(line) * c.max_blocks()];
  const int needed = c.has_kv ? c.blocks_for(r.total - 1) : 0;

  // A prefix is reused up to the prompt's last token at most: its logits are still to be computed.
  int hit = c.prefix_cache ? (r.prompt - 1) / c.block_size : 0;
  if (c.has_kv) hit = matched_blocks(r, hit);
  StatePool::Snapshot snapshot;
  if (c.has_state()) {
    snapshot = states_.find(r.tokens.get(), hit * c.block_size);
    hit = snapshot.length / c.block_size;
  }
  // What a shared plane holds depends on where chunks begin.
  while (c.serial() && hit * c.block_size % c.chunk() != 0) --hit;

  const int hit_blocks = c.has_kv ? hit : 0;
  for (int b = 0; b < hit_blocks; ++b) blocks_.ref(table[b]);
  if (hit > 0 && c.has_state()) states_.ref(snapshot.slot);
  if (blocks_.available() < needed - hit_blocks || states_.available() < c.states_per_request()) {
    for (int b = hit_blocks; b-- > 0;) blocks_.unref(table[b]);
    if (hit > 0 && c.has_state()) states_.unref(snapshot.slot);
    return false;
  }
  for (int b = hit_blocks; b < needed; ++b) table[b] = blocks_.take();
  r.states.resize(c.states_per_request());
  for (int& state : r.states) state = states_.take();

  free_lines_.pop_back();
  on_line_[line] = &r;
  line_ids_[line] = r.id;
  active_.push_back(&r);
  r.line = line;
  r.blocks = needed;
  r.chain.reserve(c.chain_limit());
  r.known = r.length = r.prompt;
  r.end = hit * c.block_size;
  r.published = hit_blocks;
  r.prefix = hit_blocks > 0 ? blocks_.id(table[hit_blocks - 1]) : 0;
  r.tail_shared = hit > 0 && c.has_state();
  r.tail = r.tail_shared ? snapshot.slot : -1;
  r.progressed = stats_.launches;
  r.acceptance = controller_.acceptance();
  if (c.max_ngram > 0) {
    r.ngram.enable();
    for (int at = 1; at < r.prompt; ++at) r.ngram.append(r.tokens.get(), at);
  }
  stats_.prefix_hit_tokens += r.end;
  return true;
}

void Scheduler::release(Request& r) {
  admissible_ = true;
  if (!r.running()) return queue_.remove(&r);
  for (Span& span : r.chain) release_span(span);
  if (r.tail_shared) states_.unref(r.tail);
  for (const int state : r.states) states_.unref(state);
  // The end of a prefix first, so that the cache loses it first.
  int32_t* table = &block_table_[size_t(r.line) * config_.max_blocks()];
  for (int b = r.blocks; b-- > 0;) {
    blocks_.unref(table[b]);
    table[b] = -1;
  }
  on_line_[r.line] = nullptr;
  line_ids_[r.line] = -1;
  free_lines_.push_back(r.line);
  active_.erase(std::find(active_.begin(), active_.end(), &r));
}

}  // namespace effinfer::engine
