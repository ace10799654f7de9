// What a launch is made of, in arrays that the runner reads as they are, and what came of it.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "engine/config.h"

namespace effinfer::engine {

template <class T>
struct Column {
  explicit Column(int capacity) : data(capacity) {}
  void push(T value) { data[count++] = value; }

  std::vector<T> data;  // of fixed size, so that views of it stay valid
  int count = 0;
};

struct Launch {
  explicit Launch(const Config& c)
      : tokens(c.max_rows),
        positions(c.max_rows),
        loops(c.max_rows),
        arena(c.max_rows),
        lines(c.max_rows),
        kv_slots(c.max_rows),
        segments(c.max_rows),
        wanted(c.max_rows),
        wanted_loops(c.max_rows),
        wanted_positions(c.max_rows),
        wanted_arena(c.max_rows),
        wanted_ids(c.max_rows),
        wanted_draft(c.max_rows),
        wanted_final(c.max_rows),
        propagations(c.max_rows),
        events(2 * (c.max_rows + c.max_slots) + 64) {}

  void clear() {
    for (auto* column : {&tokens, &positions, &loops, &arena, &lines, &kv_slots}) column->count = 0;
    for (auto* column : {&wanted, &wanted_loops, &wanted_positions, &wanted_arena})
      column->count = 0;
    segments.count = wanted_ids.count = wanted_draft.count = wanted_final.count = 0;
    fresh = early = 0;
  }

  // Per row, sorted by loop, then line, then position.
  Column<int32_t> tokens, positions, loops, arena, lines, kv_slots;
  int fresh = 0;  // of them, those of loop 0: they come first
  // Rows of one request at one loop: first row, rows, loop, line, state_in, state_out.
  Column<std::array<int32_t, 6>> segments;
  // Rows whose logits are wanted, and what the columns above hold for them; whose they are; whether
  // drafts stand before them; whether their tokens are taken whatever the policy says: such come
  // last.
  Column<int32_t> wanted, wanted_loops, wanted_positions, wanted_arena;
  Column<int64_t> wanted_ids;
  Column<uint8_t> wanted_draft, wanted_final;
  int early = 0;  // of them, those that are not final: the policy is asked about these first ones
  // Exited positions whose deeper planes are to be written from their hidden state: arena row,
  // position, line, KV slot, first of those planes.
  Column<std::array<int32_t, 5>> propagations;
  // request id, token, depth, kind
  Column<std::array<int64_t, 4>> events;
};

struct Stats {
  int64_t launches = 0, rows = 0;
  int64_t prefill_rows = 0, decode_rows = 0, fill_rows = 0, verify_rows = 0, draft_rows = 0;
  int64_t drafts_accepted = 0, drafts_flushed = 0;
  // Early exits' tokens that were held against full depth's: lossless all of them, exit a sample.
  int64_t exits_checked = 0, exits_agreed = 0;
  int64_t prefix_hit_tokens = 0;
  int64_t requests = 0;
  std::vector<int64_t> depths;  // tokens by the loops they took (lossless: were predicted after)
  std::vector<int64_t> rows_at_loop;
};

}  // namespace effinfer::engine
