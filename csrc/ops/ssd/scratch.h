// Where the parts of a worker's scratch lie, in floats.
#pragma once
#include "ops/ssd/ssd.h"

namespace effinfer {
namespace {

constexpr int64_t kPanel = 16;     // columns of a packed panel: two vectors of AVX2, one of AVX-512
constexpr int64_t kRowsMost = 12;  // rows of the tallest tile: packed states are padded to it

struct SsdScratch {
  int64_t panels;        // of P
  int64_t state_rows;    // N, padded to whole tiles
  int64_t group_stride;  // N, padded to whole tiles and vectors
  int64_t state_floats;  // of one packed state [panel][n][16]
  int64_t B, C, Bt, G;   // of a group: [token][n], [token][n], [token panel][n][16], [token][token]
  int64_t M;             // of a head: [token][token]
  int64_t X;             // of a head: [panel][token][16]
  int64_t Xw, Y;         // of a panel: [token][16]
  int64_t D;             // of a head: [P] padded
  int64_t delta, decay, post, pre;  // of a head: [token]
  int64_t spare, states;            // packed states: one to spare, then one per head
  int64_t total_floats;

  SsdScratch(const Ssd& a, int64_t heads) {
    panels = (a.head_dim + kPanel - 1) / kPanel;
    state_rows = (a.state_dim + kRowsMost - 1) / kRowsMost * kRowsMost;
    state_floats = panels * state_rows * kPanel;
    const int64_t vectors = (a.state_dim + kPanel - 1) / kPanel * kPanel;
    group_stride = vectors > state_rows ? vectors : state_rows;
    int64_t at = 0;
    const auto take = [&at](int64_t floats) {
      const int64_t begin = at;
      at += (floats + 15) / 16 * 16;
      return begin;
    };
    B = take(kSsdChunk * group_stride);
    C = take(kSsdChunk * group_stride);
    Bt = take(kSsdChunk / kPanel * state_rows * kPanel);
    G = take(kSsdChunk * kSsdChunk);
    M = take(kSsdChunk * kSsdChunk);
    X = take(panels * kSsdChunk * kPanel);
    Xw = take(kSsdChunk * kPanel);
    Y = take(kSsdChunk * kPanel);
    D = take(panels * kPanel);
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
