// commit(): what a launch's tokens and exits mean for each request.
#include <algorithm>

#include "engine/errors.h"
#include "engine/scheduler.h"

namespace effinfer::engine {

int Scheduler::commit(const int32_t* tokens, const uint8_t* exits, double now) {
  if (!in_flight_) throw std::runtime_error("commit: there is no plan to commit");
  in_flight_ = false;
  launch_.events.count = launch_.propagations.count = 0;
  for (Request* request : on_line_)
    if (request && request->ending == kToken) advance(*request, tokens, exits);
  if (config_.drafts()) trials_.ran(now - started_, progress_, prompts_);
  expire(now);
  deliver_endings();
  return launch_.events.count;
}

// Chain order: whether a draft counts depends on the spans before it.
void Scheduler::advance(Request& r, const int32_t* tokens, const uint8_t* exits) {
  const Config& c = config_;
  for (size_t i = 0; i < r.chain.size();) {
    Span& span = r.chain[i];
    if (!span.picked) {
      ++i;
      continue;
    }
    span.picked = false;
    ++span.loop;
    const bool exit = span.wanted > 0 && (launch_.wanted_final.data[span.wanted_at] ||
                                          (exits && exits[span.wanted_at]));
    if (span.wanted > 0 && span.sampled) {
      check_exit(tokens[span.wanted_at] == r.tokens[span.end()]);
    } else if (span.wanted > 0 && (span.loop == c.loops || (c.mode == Mode::exit && exit))) {
      settle(r, i, tokens);
      if (r.ending != kToken) return;
      if (span.loop < c.loops) span.sampled = samples(span);
    } else if (span.wanted > 0 && c.mode == Mode::lossless) {
      predict(r, i, exit, tokens[span.wanted_at]);
    }
    if (c.shallow() && span.loop == 1 && c.loops > 1) keep_last_row(r, span);
    const bool dropped = c.mode == Mode::exit && span.exited && !c.fills() && !span.sampled;
    if (dropped && span.loop < c.loops && c.kv_policy == KvPolicy::propagate) propagate(r, span);
    if (dropped || span.loop == c.loops)
      retire(r);
    else
      ++i;
  }
}

// lossless: an early exit's token is a draft, for the next span to begin with. The deepest logits
// know best: where they say another token, what was drafted before is dropped.
void Scheduler::predict(Request& r, size_t index, bool exit, int32_t token) {
  Span& span = r.chain[index];
  const uint64_t bit = uint64_t{1} << span.loop;
  if (span.exited) {
    controller_.rechecked(span.loop, token == span.draft);
    if (token == span.draft) {
      span.said |= bit;
      return;
    }
    learn_draft(r, span, false);
    flush_after(r, index);
    r.length = span.end();
    span.exited = false;
    span.draft_depth = 0;
  } else {
    controller_.offered_exit(exit);
  }
  if (!exit) return;
  span.exited = true;
  span.draft = token;
  span.draft_depth = span.loop;
  span.said = bit;
  if (r.length == span.end() && span.end() < r.total - 1 && !r.stops_at(token))
    r.tokens[r.length++] = token;
}

// A span's tokens are certain: its last loop has run, or the policy took them.
void Scheduler::settle(Request& r, size_t index, const int32_t* tokens) {
  Span& span = r.chain[index];
  for (int row = 0; row < span.wanted; ++row) {
    const int32_t token = tokens[span.wanted_at + row];
    const int at = r.known;
    const bool drafted = at < r.length;
    const bool right = drafted && r.tokens[at] == token;
    int depth = span.loop;
    if (span.draft_depth > 0) {
      learn_draft(r, span, span.draft == token);
      check_exit(span.draft == token);
      if (span.draft == token) depth = span.draft_depth;
    }
    if (!right) {
      flush_after(r, index);
      r.tokens[at] = token;
      r.length = at + 1;
    }
    if (right) {
      ++stats_.drafts_accepted;
      const bool begun = index + 1 < r.chain.size();  // not so when a stop or room came between
      const int ran = span.proposed > 0 ? 1
                      : begun           ? r.chain[index + 1].loop + r.chain[index + 1].picked
                                        : 0;
      controller_.saved(ran);
      progress_ += ran;
    }
    append_certain(r, token, span.loop, depth);
    if (r.ending != kToken) return;
    if (!right) break;
  }
  span.exited = true;
  const int right_rows = r.known - 1 - span.first;
  if (span.proposed == 0 || right_rows == span.length) return;
  // Prompt lookup was wrong somewhere. Keys and values can be cut there; recurrent state can't.
  stats_.drafts_flushed += span.length - right_rows;
  span.length = config_.has_state() ? 0 : right_rows;
  r.end = span.end();
  r.tail = span.state_in;
}

void Scheduler::learn(Request& r, bool right) {
  controller_.predicted(right);
  r.acceptance += (right - r.acceptance) / 8;
}

void Scheduler::learn_draft(Request& r, const Span& span, bool right) {
  learn(r, right);
  for (int depth = span.draft_depth; depth < config_.loops; ++depth)
    if (span.said >> depth & 1) controller_.predicted(depth, depth > span.draft_depth, right);
}

// Whether an early exit's remaining loops are to tell what full depth would have said. Where they
// would not run anyway, what they leave behind must not depend on other requests' exits.
bool Scheduler::samples(const Span& span) {
  const Config& c = config_;
  if (c.mode != Mode::exit) return false;
  if (c.fills()) return ++early_exits_ % kSampleEvery == 0;
  return c.kv_policy == KvPolicy::propagate && span.end() % kSampleEvery == 0;
}

void Scheduler::check_exit(bool agreed) {
  ++stats_.exits_checked;
  stats_.exits_agreed += agreed;
}

// tokens[known] is now certain, after `depth` loops; `needed` of them would have done.
void Scheduler::append_certain(Request& r, int32_t token, int depth, int needed) {
  ++stats_.depths[needed - 1];
  const int at = r.known++;
  if (r.stops_at(token)) {
    r.last_token = token;
    r.last_depth = depth;
    return mark_ended(r, kStop);
  }
  launch_.events.push({r.id, token, depth, kToken});
  if (r.known == r.total) return mark_ended(r, kLength);
  const int hit = r.ngram.append(r.tokens.get(), at);
  if (hit >= 0) learn(r, hit == 1);
}

// Of a prompt whose deeper loops leave nothing behind, only the row with logits goes on.
void Scheduler::keep_last_row(Request& r, Span& span) {
  if (span.end() < r.prompt) {
    span.loop = config_.loops;
    return;
  }
  const int last = span.end() - 1;
  for (; span.first < last; ++span.first, --span.length) {
    const int next = arena_.next(span.arena);
    arena_.give_one(span.arena);
    span.arena = next;
  }
}

void Scheduler::propagate(const Request& r, const Span& span) {
  const Config& c = config_;
  const int at = span.first;
  const int block = block_table_[size_t(r.line) * c.max_blocks() + at / c.block_size];
  launch_.propagations.push(
      {span.arena, at, r.line, block * c.block_size + at % c.block_size, span.loop});
}

}  // namespace effinfer::engine
