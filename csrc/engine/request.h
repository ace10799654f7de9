// A request and the work it has in flight: a chain of spans.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine/list.h"
#include "engine/ngram.h"
#include "engine/state_pool.h"

namespace effinfer::engine {

// What the caller is told about a request. All but kToken end it.
enum Event : int64_t { kToken, kLength, kStop, kCancelled, kDeadline, kError };

// Consecutive positions of one request that go through the loops together: a chunk of the prompt,
// one decoded position, or such a position with proposed tokens behind it. Along a chain positions
// rise and loops never do: a span runs a loop after, or in the same launch as, the span before it.
struct Span {
  int first = 0, length = 0;
  int loop = 0;    // the next to run
  int arena = -1;  // its hidden rows, linked
  int state_in = -1, state_out = -1;
  bool in_shared = false, out_shared = false;  // the slot is a snapshot this span refers to
  bool picked = false;                         // aboard the launch
  bool exited = false;                         // its token is out (exit) or predicted (lossless)
  bool sampled = false;                        // exit: its last loop's token is compared, too
  bool probed = false;                         // asked for early logits if only to learn from them
  int proposed = 0;                            // its last rows are tokens of prompt lookup
  int wanted = 0;                              // rows with logits, in the launch from wanted_at on
  int wanted_at = 0;
  int32_t draft = -1;   // the token that the last early logits predicted; counts while exited,
  int draft_depth = 0;  // first after so many loops,
  uint64_t said = 0;    // and after those of these bits

  int end() const { return first + length; }
};

struct Request {
  int64_t id = 0;
  Tokens tokens;  // prompt, generated tokens, drafts
  int prompt = 0;
  int total = 0;  // tokens when max_new_tokens are out; the last one is never fed back
  std::vector<int32_t> stop_ids;
  int priority = 0;
  double deadline = std::numeric_limits<double>::infinity();
  int min_loops = 1, max_loops = 1;  // that a token may take; a prompt's may take all

  // Waiting.
  Link<Request> arrival, level;  // in the queue: all, and those of its priority
  int64_t serial = 0;            // counts arrivals
  int overtaken = 0;             // by later arrivals, since it is the oldest that waits

  // Running.
  int line = -1;  // its line of the block table
  int blocks = 0;
  std::vector<Span> chain;
  int known = 0;             // tokens that are certain
  int length = 0;            // tokens, drafts included
  int end = 0;               // positions that the chain has covered
  std::vector<int> states;   // slots of its own
  int spans = 0;             // ever begun; picks the slot of the ring
  int tail = -1;             // the slot with the state after the chain; -1: zeros
  bool tail_shared = false;  // it is a snapshot, which the request refers to
  int published = 0;         // blocks offered to the prefix cache
  uint64_t prefix = 0;       // what they hold, by the name the block pool gave it
  int64_t progressed = 0;    // the last launch that ran work it waits for
  double acceptance = 1;     // of its drafts, a moving average
  Ngram ngram;

  // Ending.
  Event ending = kToken;
  int32_t last_token = -1;  // the stop token
  int last_depth = 0;

  bool running() const { return line >= 0; }
  bool stops_at(int32_t token) const {
    for (const int32_t id : stop_ids)
      if (id == token) return true;
    return false;
  }
};

}  // namespace effinfer::engine
