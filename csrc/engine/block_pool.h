// Fixed-size blocks of KV positions, counted by the requests that read them, and an index of full
// blocks by content, so that equal prefixes are stored once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace effinfer::engine {

class BlockPool {
 public:
  BlockPool(int num_blocks, int block_size);

  int size() const { return static_cast<int>(blocks_.size()); }
  // Blocks that take() can still give: free ones, and cached ones nobody reads.
  int available() const { return static_cast<int>(free_.size()) + idle_; }
  int cached() const { return cached_; }
  int idle() const { return idle_; }

  // A block with one reference; the index forgets the content used least recently if none is free.
  // available() must be positive.
  int take();
  void ref(int block);
  // The last reference gone, a cached block stays findable until its memory is needed.
  void unref(int block);

  // The cached block that holds `tokens` (block_size of them) after the prefix `parent`, or -1.
  // A prefix is named by id(its last block); 0 is the empty one.
  int find(uint64_t parent, const int32_t* tokens) const;
  uint64_t id(int block) const { return blocks_[block].id; }
  // Makes a written block findable, unless its content is already; returns the prefix it ends.
  uint64_t publish(int block, uint64_t parent, const int32_t* tokens);

  int refs(int block) const { return blocks_[block].refs; }
  // Throws when `refs`, counted by the caller, or the lists disagree.
  void check(const std::vector<int>& refs) const;

 private:
  struct Block {
    int refs = 0;
    uint64_t id = 0;      // of the prefix this block ends, never used again; 0: not cached
    uint64_t parent = 0;  // id of the prefix before it
    int next_in_bucket = -1;
    int older = -1, newer = -1;  // neighbours among the idle
  };
  int bucket(uint64_t parent, const int32_t* tokens) const;
  const int32_t* tokens(int block) const { return &tokens_[std::size_t(block) * block_size_]; }
  void forget(int block);
  void unlink(int block);

  int block_size_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tokens_;  // of cached blocks
  std::vector<int> free_;
  std::vector<int> buckets_;
  int oldest_ = -1, newest_ = -1, idle_ = 0;  // cached blocks without references
  int cached_ = 0;
  uint64_t last_id_ = 0;
};

}  // namespace effinfer::engine
