// The chain of a request's spans: how one begins, which state slots it uses, how it goes.
#include <algorithm>

#include "engine/scheduler.h"

namespace effinfer::engine {

// Positions of the request's next prompt chunk, within `room` rows; 0 or less: none now.
int Scheduler::chunk_length(const Request& r, int room) const {
  const Config& c = config_;
  if (c.serial()) {  // the same chunks whatever shares the launch
    const int length = std::min(r.prompt, (r.end / c.chunk() + 1) * c.chunk()) - r.end;
    return length <= room ? length : 0;
  }
  int end = std::min(r.prompt, r.end + room);
  if (c.has_state() && c.prefix_cache) {  // end where a snapshot is of use to others
    const int last = (r.prompt - 1) / c.block_size * c.block_size;
    if (r.end < last) end = std::min(end, last);
    const int boundary = end / c.block_size * c.block_size;
    if (end < r.prompt && boundary > r.end) end = boundary;
  }
  return end - r.end;
}

Span& Scheduler::begin_span(Request& r, int length) {
  Span& span = r.chain.emplace_back();
  span.first = r.end;
  span.length = length;
  if (config_.loops > 1) span.arena = arena_.take(length);
  r.end += length;
  if (config_.has_state()) choose_states(r, span);
  ++r.spans;
  span.probed =
      config_.mode == Mode::lossless && drafting_ && span.end() >= r.prompt && controller_.probes();
  return span;
}

void Scheduler::choose_states(Request& r, Span& span) {
  const Config& c = config_;
  span.state_in = r.tail;
  span.in_shared = r.tail_shared;
  if (c.ring())
    span.state_out = r.states[r.spans % r.states.size()];
  else
    span.state_out = r.tail < 0 || r.tail_shared ? r.states[0] : r.tail;
  if (c.prefix_cache && span.end() < r.prompt && span.end() % c.block_size == 0) {
    // The last snapshot of a prompt is worth forgetting another; those on the way are not.
    const bool last = span.end() + c.block_size >= r.prompt;
    if ((last ? states_.available() : states_.unused()) > 0) {
      span.state_out = states_.take();  // referred to by the span that writes it,
      states_.ref(span.state_out);      // and by the request until its next span reads it
      span.out_shared = true;
    }
  }
  r.tail = span.state_out;
  r.tail_shared = span.out_shared;
}

void Scheduler::release_span(Span& span) {
  arena_.give(span.arena);
  if (span.in_shared) states_.unref(span.state_in);
  if (span.out_shared) states_.unref(span.state_out);
}

// The span at the front of the chain is through: what it wrote is complete.
void Scheduler::retire(Request& r) {
  Span& span = r.chain.front();
  publish_blocks(r, span.end());
  if (span.out_shared) states_.publish(span.state_out, r.tokens, span.end());
  release_span(span);
  r.chain.erase(r.chain.begin());
}

void Scheduler::publish_blocks(Request& r, int end) {
  const Config& c = config_;
  if (!c.prefix_cache || !c.has_kv) return;
  if (!c.shares_generated()) end = std::min(end, r.prompt);
  const int32_t* table = &block_table_[size_t(r.line) * c.max_blocks()];
  for (; (r.published + 1) * c.block_size <= end; ++r.published)
    r.prefix = blocks_.publish(table[r.published], r.prefix,
                               &r.tokens[size_t(r.published) * c.block_size]);
}

// Drops the spans behind chain[index]: the token they began with was wrong.
void Scheduler::flush_after(Request& r, size_t index) {
  const size_t dropped = r.chain.size() - index - 1;
  if (dropped == 0) return;
  for (size_t i = index + 1; i < r.chain.size(); ++i) {
    stats_.drafts_flushed += r.chain[i].loop + r.chain[i].picked;
    release_span(r.chain[i]);
  }
  r.chain.resize(index + 1);
  r.spans -= static_cast<int>(dropped);  // the ring goes back with them
  r.end = r.chain[index].end();
  r.tail = r.chain[index].state_out;
  r.tail_shared = false;
}

}  // namespace effinfer::engine
