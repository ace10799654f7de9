// What a scheduler is told once: the shape of the model's loop and the sizes of the pools.
#pragma once
#include <vector>

namespace effinfer::engine {

// full: every position runs every loop. exit: a policy may take a token early. lossless: an early
// token is a draft, which the position's last loop verifies.
enum class Mode { full, exit, lossless };

// Where loop l of a position keeps its keys and values, and so what an early exit leaves behind.
//   depth      a plane per loop; the loops an exit skipped are computed later (exact)
//   first      loop 0 writes, every loop reads it; deeper loops leave nothing behind
//   shared     one plane that each loop overwrites
//   propagate  a plane per loop; those an exit skipped are written from the hidden state it had
enum class KvPolicy { depth, first, shared, propagate };

struct Config {
  int loops = 1;  // R: launches that a position needs
  int r_min = 1;  // loops before the first exit
  Mode mode = Mode::full;
  KvPolicy kv_policy = KvPolicy::depth;
  int max_slots = 1;      // requests running at once
  int max_rows = 1;       // rows of a launch
  int prefill_chunk = 1;  // new prompt rows of a launch
  int block_size = 16;    // positions of a KV block
  int num_blocks = 0;
  bool has_kv = true;
  int num_states = 0;  // recurrent state slots; 0: the model has no recurrent layers
  int max_positions = 1;
  int max_ngram = 0;  // tokens that prompt lookup proposes, with loops = 1
  bool prefix_cache = true;
  // Seconds of a launch of n = 1..max_rows rows, and of the logits of as many; what drafts are
  // weighed by.
  std::vector<double> costs, head_costs;

  bool has_state() const { return num_states > 0; }
  // One plane for all loops: a position is read only when nothing overwrites it any more.
  bool serial() const { return has_kv && kv_policy == KvPolicy::shared; }
  // The loops that an exit skips must still be computed.
  bool fills() const {
    return has_state() || kv_policy == KvPolicy::depth || mode == Mode::lossless;
  }
  // Only loop 0 leaves something behind, so of a prompt only the last row goes deeper.
  bool shallow() const { return has_kv && !has_state() && kv_policy == KvPolicy::first; }
  // A prompt's last row may exit: what its chunk has computed by then does not depend on it.
  bool prefill_exits() const {
    return kv_policy == KvPolicy::depth || kv_policy == KvPolicy::first;
  }
  bool drafts() const { return (mode == Mode::lossless && !serial()) || max_ngram > 0; }
  // Without a plane that outlives an exit, what a generated position leaves depends on the schedule
  // of exits; then only prompts are worth sharing.
  bool shares_generated() const { return !serial() && kv_policy != KvPolicy::propagate; }

  int chunk() const { return prefill_chunk < max_rows ? prefill_chunk : max_rows; }
  int blocks_for(int positions) const { return (positions + block_size - 1) / block_size; }
  int max_blocks() const { return blocks_for(max_positions); }
  // A ring of states, so that a flushed draft leaves the state before it.
  bool ring() const { return mode == Mode::lossless && loops > 1; }
  // Prompt lookup needs a second one, to draft into.
  int states_per_request() const {
    return !has_state() ? 0 : ring() ? loops : max_ngram > 0 ? 2 : 1;
  }
  // Spans that one request may have in flight. In lossless the ring of states is this long; in exit
  // mode a few exited positions wait together, so that their remaining loops share launches.
  int chain_limit() const {
    return mode == Mode::exit && 2 * loops < 8 ? 8 : mode == Mode::exit ? 2 * loops : loops;
  }
  // Hidden rows kept between loops. The first part is the decoding spans' own, so that prompts
  // can't take it.
  int decode_arena() const { return max_slots * chain_limit(); }
  int arena_rows() const { return loops == 1 ? max_rows : decode_arena() + loops * max_rows; }
};

// Throws std::invalid_argument for a configuration that can't work.
void validate(const Config& config);

}  // namespace effinfer::engine
