// Where the parts of a worker's scratch lie, in floats.
#pragma once
#include "ops/ssd/ssd.h"

namespace effinfer {
namespace {

constexpr int64_t kPanel = 16;     // columns of a packed panel: two vectors of AVX2, one of AVX-512
constexpr int64_t kRowsMost = 12;  // rows of the tallest tile: packed states are padded to it

struct SsdScratch {
  int64_t panels;        // of P
  int64_t state_rows;    // N, padded
  int64_t state_floats;  // of one packed state [panel][n][16]
  int64_t token_floats;  // of one array [panel][token][16]
  int64_t B, C, Bt, G;   // of a group: [token][n], [token][n], [token panel][n][16], [token][token]
  int64_t M, X, Xw, Y;   // of a head: [token][token], then three arrays like token_floats
  int64_t D, row;        // of a head: [P] padded, [P] padded
  int64_t delta, decay, post, pre;  // of a head: [token]
  int64_t spare, states;            // packed states: one to spare, then one per head
  int64_t total_floats;

  SsdScratch(const Ssd& a, int64_t heads) {
    panels = (a.head_dim + kPanel - 1) / kPanel;
    state_rows = (a.state_dim + kRowsMost - 1) / kRowsMost * kRowsMost;
    state_floats = panels * state_rows * kPanel;
    token_floats = panels * kSsdChunk * kPanel;
    int64_t at = 0;
    const auto take = [&at](int64_t floats) {
      const int64_t begin = at;
      at += (floats + 15) / 16 * 16;
      return begin;
    };
    B = take(kSsdChunk * state_rows);
    C = take(kSsdChunk * state_rows);
    Bt = take(kSsdChunk / kPanel * state_rows * kPanel);
    G = take(kSsdChunk * kSsdChunk);
    M = take(kSsdChunk * kSsdChunk);
    X = take(token_floats);
    Xw = take(token_floats);
    Y = take(token_floats);
    D = take(panels * kPanel);
    row = take(panels * kPanel);
    delta = take(kSsdChunk);
    decay = take(kSsdChunk);
    post = take(kSsdChunk);
    pre = take(kSsdChunk);
    spare = take(state_floats);
    states = take(heads * state_floats);
    total_floats = at;
  }
};

}  // namespace
}  // namespace effinfer
