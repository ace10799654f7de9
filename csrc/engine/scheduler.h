// Continuous and depth-wise batching: decides which rows run in each launch of the model's loop.
//
// plan() ends requests that are cancelled or late, admits waiting ones, and fills a launch; the
// caller runs it, picks a token from every wanted row's logits, and commit()s them. Rows of
// different loops share a launch, for the loop's weights are the same at every depth (Relaxed
// Recursive Transformers, arXiv 2410.20672). One thread drives it; nothing allocates per launch.
//
// Admission reserves all blocks and state slots that a request can need, so that what is admitted
// finishes.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/arena.h"
#include "engine/block_pool.h"
#include "engine/config.h"
#include "engine/draft_controller.h"
#include "engine/draft_trials.h"
#include "engine/launch.h"
#include "engine/request.h"
#include "engine/request_queue.h"
#include "engine/state_pool.h"

namespace effinfer::engine {

class Scheduler {
 public:
  // A request that could run but was left out of this many launches goes first in the next one.
  static constexpr int kPatience = 8;
  // exit: one early exit of so many is held against full depth's token, for its fill rows run
  // anyway; propagate: those at one position of so many, whose remaining loops run for it.
  static constexpr int kSampleEvery = 64;

  explicit Scheduler(Config config);

  // Queues a request. Throws std::invalid_argument for one that could never run.
  // Its tokens take min_loops loops or more (the policy is asked from then on), and max_loops or
  // fewer; but where a prompt's last row may not exit, the first token takes all.
  void submit(int64_t id, const int32_t* prompt, int64_t prompt_length, int64_t max_new_tokens,
              std::vector<int32_t> stop_ids, int priority, double deadline, int min_loops,
              int max_loops);
  // Ends a request, waiting or running, as kCancelled, kStop or kError; false when there is none of
  // that id that has not ended. Its event comes with the next plan() or commit().
  bool end(int64_t id, Event kind);

  // Rows of the next launch; 0: nothing to do. Events are those of this call.
  int plan(double now);
  // The token taken from each wanted row's logits, and whether the policy lets it exit there (null:
  // it never does). Returns the number of events.
  int commit(const int32_t* tokens, const uint8_t* exits, double now);

  const Config& config() const { return config_; }
  Launch& launch() { return launch_; }
  const Stats& stats() const { return stats_; }
  const RequestQueue& queue() const { return queue_; }
  const BlockPool& blocks() const { return blocks_; }
  const StatePool& states() const { return states_; }
  const DraftController& controller() const { return controller_; }
  int running() const { return static_cast<int>(active_.size()); }
  bool in_flight() const { return in_flight_; }
  std::vector<int32_t>& block_table() { return block_table_; }
  std::vector<int64_t>& line_ids() { return line_ids_; }
  // A bit for each loop that a span of the line's request is at; 0: nothing of it is in flight.
  uint64_t loops_on_line(int line) const;
  // Tokens up to and including the position of a wanted row.
  const Tokens& history(int wanted, int* length) const;

  // Throws std::runtime_error when an invariant does not hold.
  void check() const;

 private:
  struct Candidate {
    Request* request;
    size_t span;  // in the chain; its size: one to begin
  };
  // A span aboard the launch that wants logits, and the row behind its last.
  struct Wanting {
    const Request* request;
    Span* span;
    int end;
  };
  // Candidates by rank: what is urgent, decoding from the deepest loop up, prompts on their way,
  // new prompt chunks, loops that exits skipped, drafts.
  static constexpr size_t kUrgent = 0;
  size_t decode_rank(int loop) const { return config_.loops - loop; }
  size_t prefill_rank() const { return config_.loops + 1; }
  size_t new_prefill_rank() const { return config_.loops + 2; }
  size_t fill_rank() const { return config_.loops + 3; }
  size_t drafts_rank() const { return config_.loops + 4; }

  // lifetime.cpp
  void expire(double now);
  void mark_ended(Request& request, Event kind);
  void deliver_endings();
  void admit();
  bool start(Request& request);
  int matched_blocks(const Request& request, int limit);
  void release(Request& request);

  // spans.cpp
  int chunk_length(const Request& request, int room) const;
  Span& begin_span(Request& request, int length);
  void choose_states(Request& request, Span& span);
  void release_span(Span& span);
  void retire(Request& request);
  void flush_after(Request& request, size_t index);
  void publish_blocks(Request& request, int end);

  // plan.cpp
  void collect(Request& request);
  bool can_extend(const Request& request) const;
  bool is_draft(const Request& r, const Span& span) const { return span.first >= r.known; }
  size_t rank_of(const Request& request, const Span& span) const;
  bool joins(const Span& before, const Span& span) const;
  bool pick(const Candidate& candidate);
  bool extend(Request& request);
  void take_aboard(Request& request, Span& span);
  void pick_drafts();
  void account_for_drafts();
  double worth(const Request& request, int drafts) const;
  double worth(const Candidate& candidate) const;
  int proposals(const Request& request) const;
  void propose(Request& request);
  bool wants_logits(const Request& request, const Span& span) const;
  void emit_rows();
  void emit_wanted(bool final);
  void emit_span(Request& request, Span& span);

  // commit.cpp
  void advance(Request& request, const int32_t* tokens, const uint8_t* exits);
  void predict(Request& request, size_t index, bool exit, int32_t token);
  void settle(Request& request, size_t index, const int32_t* tokens);
  void learn(Request& request, bool right);
  void learn_draft(Request& request, const Span& span, bool right);
  bool samples(const Span& span);
  void check_exit(bool agreed);
  void append_certain(Request& request, int32_t token, int depth, int needed);
  void keep_last_row(Request& request, Span& span);
  void propagate(const Request& request, const Span& span);

  Config config_;
  Launch launch_;
  Stats stats_;
  BlockPool blocks_;
  StatePool states_;
  Arena arena_;
  DraftController controller_;
  DraftTrials trials_;
  RequestQueue queue_;
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  std::vector<Request*> active_;  // running, in order of admission
  std::vector<Request*> on_line_;
  std::vector<Request*> ending_;
  std::vector<int> free_lines_;
  std::vector<int32_t> block_table_;  // [max_slots, max_blocks]
  std::vector<int64_t> line_ids_;     // the request on each line, -1 for none
  double next_deadline_;              // of those that wait: none is earlier
  int64_t early_exits_ = 0;           // exit: of tokens whose remaining loops run
  bool admissible_ = false;           // something changed since the queue was last tried
  bool in_flight_ = false;

  // Of the launch being planned.
  std::vector<std::vector<Candidate>> candidates_;
  std::vector<Wanting> wanting_;
  int room_ = 0, prefill_room_ = 0;
  size_t turn_ = 0;        // who is first when not all fit
  int decoding_ = 0;       // requests past their prompts
  bool drafting_ = false;  // drafts may be begun
  bool waiting_ = false;   // tokens begin together again, when none is on its way
  bool early_ = false;     // lossless: exits are asked for
  bool prompts_ = false;   // some of its rows are of prompts
  double started_ = 0;     // when
  int progress_ = 0;       // row-loops it brought that count: no drafts but those now known right
};

}  // namespace effinfer::engine
