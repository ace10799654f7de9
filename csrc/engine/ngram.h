// Prompt lookup (A. Saxena, 2023): what followed the last time these two tokens were seen is the
// draft. Kept up to date token by token, so that proposing costs nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace effinfer::engine {

class Ngram {
 public:
  // Allocates; without it nothing is ever proposed.
  void enable() { last_.assign(kBuckets, 0); }

  // tokens[at] has become certain. Returns 1 or 0 for a proposal for it that was right or wrong,
  // -1 when there was none.
  int append(const int32_t* tokens, int at) {
    if (last_.empty() || at < 1) return -1;
    const int hit = match_ > 0 ? tokens[match_] == tokens[at] : -1;
    int& last = last_[bucket(tokens[at - 1], tokens[at])];
    if (hit == 1)
      ++match_;  // a longer match than a fresh lookup's
    else
      match_ = last > 0 && tokens[last - 1] == tokens[at] && tokens[last - 2] == tokens[at - 1]
                   ? last
                   : 0;
    last = at + 1;
    return hit;
  }

  // The position whose token is the proposal for the next one; 0: none.
  int match() const { return match_; }

 private:
  static constexpr int kBuckets = 1024;
  static int bucket(int32_t a, int32_t b) {
    return (uint32_t(a) * 0x9E3779B1u ^ uint32_t(b) * 0x85EBCA77u) >> 22;
  }
  std::vector<int> last_;  // by hash of two tokens, the position after them
  int match_ = 0;
};

}  // namespace effinfer::engine
