// Slots for recurrent state. A slot is either owned by one request, or a snapshot: the state after
// a known prefix, which any number of requests may read but nobody writes again.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace effinfer::engine {

using Tokens = std::shared_ptr<int32_t[]>;

class StatePool {
 public:
  explicit StatePool(int num_states);

  int size() const { return static_cast<int>(slots_.size()); }
  int unused() const { return static_cast<int>(free_.size()); }
  // Slots that take() can still give: free ones, and snapshots nobody reads.
  int available() const { return unused() + idle_; }

  // A slot with one reference; the snapshot used least recently gives way if none is free.
  // available() must be positive.
  int take();
  void ref(int slot);
  void unref(int slot);

  // Slot now holds the state after tokens[0, length): findable, unless such a snapshot exists.
  void publish(int slot, const Tokens& tokens, int length);
  // The snapshot of the longest prefix of tokens[0, limit], or -1; its length comes with it.
  struct Snapshot {
    int slot = -1;
    int length = 0;
  };
  Snapshot find(const int32_t* tokens, int limit) const;

  void check(const std::vector<int>& refs) const;

 private:
  struct Slot {
    int refs = 0;
    int length = 0;  // of the prefix; 0: not a snapshot that can be found
    Tokens tokens;
    uint64_t used = 0;  // a clock that counts releases
  };
  std::vector<Slot> slots_;
  std::vector<int> free_;
  int idle_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace effinfer::engine
