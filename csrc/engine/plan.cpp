// plan(): fills a launch.
#include <algorithm>

#include "engine/errors.h"
#include "engine/scheduler.h"

namespace effinfer::engine {

int Scheduler::plan(double now) {
  if (in_flight_) throw std::runtime_error("plan: the last plan has not been committed");
  launch_.clear();
  launch_.events.count = 0;
  expire(now);
  deliver_endings();
  admit();
  if (active_.empty()) return 0;

  room_ = config_.max_rows;
  prefill_room_ = config_.chunk();
  decoding_ = 0;
  for (auto& candidates : candidates_) candidates.clear();
  early_ = waiting_ = false;
  for (const Request* r : active_) {
    decoding_ += r->end >= r->prompt;
    waiting_ |= r->end >= r->prompt && !r->chain.empty();
  }
  drafting_ = config_.drafts() && trials_.drafts(decoding_);
  waiting_ = waiting_ && config_.loops > 1 && config_.drafts() && trials_.realigns();
  for (size_t i = 0; i < active_.size(); ++i) collect(*active_[(turn_ + i) % active_.size()]);
  if (drafting_ && trials_.begins()) controller_.grant();
  auto& urgent = candidates_[kUrgent];
  std::sort(urgent.begin(), urgent.end(), [](const Candidate& a, const Candidate& b) {
    return a.request->progressed < b.request->progressed;
  });
  const Request* left_out = nullptr;
  for (size_t rank = 0; rank < drafts_rank(); ++rank)
    for (const Candidate& candidate : candidates_[rank])
      if (!pick(candidate) && rank < prefill_rank() && !left_out) left_out = candidate.request;
  if (left_out)  // next time it is its turn first
    turn_ = std::find(active_.begin(), active_.end(), left_out) - active_.begin();
  const int64_t prompt_rows = stats_.prefill_rows;
  if (drafting_) pick_drafts();
  emit_rows();
  if (config_.drafts()) account_for_drafts();
  const int rows = launch_.tokens.count;
  prompts_ = stats_.prefill_rows > prompt_rows;
  started_ = now;
  stats_.launches += rows > 0;
  stats_.rows += rows;
  in_flight_ = rows > 0;
  return rows;
}

void Scheduler::collect(Request& r) {
  for (size_t i = 0; i < r.chain.size(); ++i)
    candidates_[rank_of(r, r.chain[i])].push_back({&r, i});
  if (can_extend(r)) {
    const size_t rank = r.end < r.prompt  ? new_prefill_rank()
                        : r.end < r.known ? decode_rank(0)
                                          : drafts_rank();
    candidates_[rank].push_back({&r, r.chain.size()});
  }
  if (stats_.launches - r.progressed > kPatience) candidates_[kUrgent].push_back({&r, 0});
}

bool Scheduler::can_extend(const Request& r) const {
  if (waiting_ && r.end >= r.prompt) return false;
  if (r.end == r.length || static_cast<int>(r.chain.size()) == config_.chain_limit()) return false;
  // Dropped at their exits, spans have none before them.
  if (!config_.fills() && !r.chain.empty() && r.chain.back().sampled) return false;
  return !config_.serial() || r.chain.empty();
}

size_t Scheduler::rank_of(const Request& r, const Span& span) const {
  if (is_draft(r, span)) return drafts_rank();
  const bool full = static_cast<int>(r.chain.size()) == config_.chain_limit();
  if (config_.mode == Mode::exit && span.exited && !full && config_.fills()) return fill_rank();
  if (span.first < r.prompt) return prefill_rank();
  return decode_rank(span.loop);
}

// Whether two neighbours may run the same loop in the same launch: recurrent state then goes
// through both as if they were one, and what lies between is not kept.
bool Scheduler::joins(const Span& before, const Span& span) const {
  return !config_.has_state() || before.state_out == span.state_out;
}

// Takes a span aboard, with those before it that must run the same loop first.
bool Scheduler::pick(const Candidate& candidate) {
  Request& r = *candidate.request;
  if (candidate.span == r.chain.size()) return can_extend(r) && extend(r);
  size_t first = candidate.span;
  int rows = 0;
  for (;; --first) {
    const Span& span = r.chain[first];
    if (span.picked) {
      ++first;
      break;
    }
    rows += span.length;
    if (first == 0 || r.chain[first - 1].loop > span.loop) break;
    if (!joins(r.chain[first - 1], span)) return false;
  }
  if (rows > room_) return false;
  for (size_t i = first; i <= candidate.span; ++i) take_aboard(r, r.chain[i]);
  return true;
}

// Begins the request's next span.
bool Scheduler::extend(Request& r) {
  int length = r.length - r.end;
  if (r.end < r.prompt) {
    const int spare = config_.loops > 1 ? arena_.free() - config_.decode_arena() : room_;
    length = chunk_length(r, std::min({room_, prefill_room_, spare}));
    if (length <= 0) return false;
    prefill_room_ -= length;
  }
  if (length > room_) return false;
  take_aboard(r, begin_span(r, length));
  return true;
}

void Scheduler::take_aboard(Request& r, Span& span) {
  span.picked = true;
  room_ -= span.length;
  if (!is_draft(r, span)) r.progressed = stats_.launches + 1;
}

// The chance that so many tokens of prompt lookup are right. How well that works depends on the
// text.
double Scheduler::worth(const Request& r, int drafts) const {
  double chance = r.acceptance;
  for (int i = 1; i < drafts; ++i) chance *= r.acceptance;
  return chance;
}

// The chance that all drafts before a span are right, by the loops that said so.
double Scheduler::worth(const Candidate& candidate) const {
  const Request& r = *candidate.request;
  double chance = 1;
  for (size_t i = 0; i < candidate.span; ++i) {
    const Span& span = r.chain[i];
    if (span.end() < r.known) continue;
    const int depth = 63 - __builtin_clzll(span.said);
    chance *= controller_.acceptance(depth, depth > span.draft_depth);
  }
  return chance;
}

void Scheduler::pick_drafts() {
  const int rows = config_.max_rows - room_;
  controller_.begin(rows);
  if (config_.max_ngram > 0) {
    for (Request* r : active_)
      for (int n = 1, count = proposals(*r); n <= count; ++n) controller_.offer(worth(*r, n));
    controller_.choose(room_);
    for (Request* r : active_) propose(*r);
    return;
  }
  const auto& drafts = candidates_[drafts_rank()];
  for (const Candidate& candidate : drafts) controller_.offer(worth(candidate));
  controller_.choose(room_);
  for (const Candidate& candidate : drafts)
    if (controller_.take(worth(candidate))) pick(candidate);
  early_ = rows > 0 && controller_.asks_early(rows, decoding_);
}

void Scheduler::account_for_drafts() {
  const auto& wanted = launch_.wanted_draft;
  int plain_wanted = 0;
  for (int i = 0; i < wanted.count; ++i)
    plain_wanted += !wanted.data[i] && launch_.wanted_loops.data[i] == config_.loops - 1;
  int extra = 0;  // rows of drafts, and those that run again because of one
  for (const Request* r : active_)
    for (const Span& span : r->chain)
      if (span.picked && (is_draft(*r, span) || config_.max_ngram > 0))
        extra += is_draft(*r, span) ? span.length : span.first < r->prompt ? 0 : span.length - 1;
  const int rows = launch_.tokens.count;
  controller_.launched(rows, rows - extra, wanted.count, plain_wanted);
  progress_ = rows - extra;
}

// Tokens that prompt lookup could add to what the request runs in this launch.
int Scheduler::proposals(const Request& r) const {
  if (r.ngram.match() == 0 || r.chain.empty()) return 0;
  const Span& span = r.chain.back();
  if (!span.picked || span.first < r.prompt || span.end() != r.known) return 0;
  return std::min(config_.max_ngram, r.total - 1 - r.known);
}

void Scheduler::propose(Request& r) {
  const int count = proposals(r);
  if (count == 0) return;
  Span& span = r.chain.back();
  for (int n = 1; n <= count && room_ > 0 && controller_.take(worth(r, n)); ++n) {
    const int32_t token = r.tokens[r.ngram.match() + n - 1];
    r.tokens[r.length++] = token;
    ++span.length;
    ++span.proposed;
    --room_;
    if (r.stops_at(token)) break;
  }
  r.end = span.end();
  if (span.proposed == 0 || !config_.has_state()) return;
  // Into the other slot: where a proposal is wrong, this span's positions run again from state_in.
  span.state_out = span.state_in == r.states[0] ? r.states[1] : r.states[0];
  r.tail = span.state_out;
}

bool Scheduler::wants_logits(const Request& r, const Span& span) const {
  const Config& c = config_;
  if (span.end() < r.prompt) return false;
  if (span.loop == c.loops - 1) return c.mode != Mode::exit || !span.exited || span.sampled;
  if (c.mode == Mode::full || span.loop < r.min_loops - 1) return false;
  if (span.first < r.prompt && !c.prefill_exits()) return false;
  if (c.mode == Mode::exit) return !span.exited;
  if (!c.drafts() || span.end() >= r.total - 1) return false;
  if (span.probed || !early_) return span.probed;
  return !span.exited || controller_.rechecks(span.loop + 1, decoding_);
}

void Scheduler::emit_rows() {
  wanting_.clear();
  for (int loop = 0; loop < config_.loops; ++loop) {
    for (Request* r : on_line_)
      if (r)
        for (Span& span : r->chain)
          if (span.picked && span.loop == loop) emit_span(*r, span);
    if (loop == 0) launch_.fresh = launch_.tokens.count;
  }
  emit_wanted(false);
  launch_.early = launch_.wanted.count;
  emit_wanted(true);
}

// Rows whose logits are wanted: of spans whose tokens are final, or of the others.
void Scheduler::emit_wanted(bool final) {
  Launch& launch = launch_;
  for (const Wanting& wanting : wanting_) {
    const Request& r = *wanting.request;
    Span& span = *wanting.span;
    if ((span.loop >= r.max_loops - 1) != final) continue;
    span.wanted_at = launch.wanted.count;
    for (int row = wanting.end - span.wanted; row < wanting.end; ++row) {
      launch.wanted.push(row);
      launch.wanted_loops.push(span.loop);
      launch.wanted_positions.push(launch.positions.data[row]);
      launch.wanted_arena.push(launch.arena.data[row]);
      launch.wanted_ids.push(r.id);
      launch.wanted_draft.push(launch.positions.data[row] >= r.known);
      launch.wanted_final.push(final);
    }
  }
}

void Scheduler::emit_span(Request& r, Span& span) {
  const Config& c = config_;
  Launch& launch = launch_;
  const int first_row = launch.tokens.count;
  const bool writes_kv = c.has_kv && (c.kv_policy != KvPolicy::first || span.loop == 0);
  const int32_t* table = &block_table_[size_t(r.line) * c.max_blocks()];
  for (int at = span.first, arena = span.arena; at < span.end(); ++at) {
    launch.arena.push(c.loops > 1 ? arena : launch.tokens.count);
    if (c.loops > 1) arena = arena_.next(arena);
    launch.tokens.push(r.tokens[at]);
    launch.positions.push(at);
    launch.loops.push(span.loop);
    launch.lines.push(r.line);
    launch.kv_slots.push(writes_kv ? table[at / c.block_size] * c.block_size + at % c.block_size
                                   : -1);
  }
  auto& segments = launch.segments;
  auto* last = segments.count > 0 ? &segments.data[segments.count - 1] : nullptr;
  if (last && (*last)[2] == span.loop && (*last)[3] == r.line) {
    (*last)[1] += span.length;
    (*last)[5] = span.state_out;
  } else {
    segments.push({first_row, span.length, span.loop, r.line, span.state_in, span.state_out});
  }
  span.wanted = wants_logits(r, span) ? 1 + span.proposed : 0;
  if (span.wanted > 0) wanting_.push_back({&r, &span, launch.tokens.count});
  const bool fill = c.mode == Mode::exit && span.exited;
  const bool verify = c.mode == Mode::lossless && span.exited;
  stats_.draft_rows += span.proposed;
  (is_draft(r, span)        ? stats_.draft_rows
   : fill                   ? stats_.fill_rows
   : verify                 ? stats_.verify_rows
   : span.end() <= r.prompt ? stats_.prefill_rows
                            : stats_.decode_rows) += span.length - span.proposed;
  stats_.rows_at_loop[span.loop] += span.length;
}

}  // namespace effinfer::engine
