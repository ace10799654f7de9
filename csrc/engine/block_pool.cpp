#include "engine/block_pool.h"

#include <algorithm>
#include <bit>

#include "engine/errors.h"

namespace effinfer::engine {

BlockPool::BlockPool(int num_blocks, int block_size)
    : block_size_(block_size),
      blocks_(num_blocks),
      tokens_(size_t(num_blocks) * block_size),
      buckets_(std::bit_ceil(unsigned(num_blocks) + 1), -1) {
  for (int block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

int BlockPool::take() {
  if (free_.empty()) {
    const int block = oldest_;
    unlink(block);
    forget(block);
    free_.push_back(block);
  }
  const int block = free_.back();
  free_.pop_back();
  blocks_[block].refs = 1;
  return block;
}

void BlockPool::ref(int block) {
  if (blocks_[block].refs++ == 0) unlink(block);
}

void BlockPool::unref(int index) {
  Block& block = blocks_[index];
  if (--block.refs > 0) return;
  if (block.id == 0) {
    free_.push_back(index);
    return;
  }
  block.older = newest_;
  block.newer = -1;
  (newest_ < 0 ? oldest_ : blocks_[newest_].newer) = index;
  newest_ = index;
  ++idle_;
}

int BlockPool::find(uint64_t parent, const int32_t* content) const {
  for (int i = buckets_[bucket(parent, content)]; i >= 0; i = blocks_[i].next_in_bucket)
    if (blocks_[i].parent == parent && std::equal(content, content + block_size_, tokens(i)))
      return i;
  return -1;
}

uint64_t BlockPool::publish(int index, uint64_t parent, const int32_t* content) {
  const int known = find(parent, content);
  if (known >= 0) return blocks_[known].id;
  Block& block = blocks_[index];
  block.id = ++last_id_;
  block.parent = parent;
  std::copy_n(content, block_size_, &tokens_[size_t(index) * block_size_]);
  int& head = buckets_[bucket(parent, content)];
  block.next_in_bucket = head;
  head = index;
  ++cached_;
  return block.id;
}

int BlockPool::bucket(uint64_t parent, const int32_t* content) const {
  uint64_t hash = parent;
  for (int i = 0; i < block_size_; ++i) {
    hash = (hash ^ uint32_t(content[i])) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return static_cast<int>(hash & (buckets_.size() - 1));
}

void BlockPool::forget(int index) {
  Block& block = blocks_[index];
  int* link = &buckets_[bucket(block.parent, tokens(index))];
  while (*link != index) link = &blocks_[*link].next_in_bucket;
  *link = block.next_in_bucket;
  block.id = 0;
  --cached_;
}

void BlockPool::unlink(int index) {
  const Block& block = blocks_[index];
  (block.older < 0 ? oldest_ : blocks_[block.older].newer) = block.newer;
  (block.newer < 0 ? newest_ : blocks_[block.newer].older) = block.older;
  --idle_;
}

void BlockPool::check(const std::vector<int>& refs) const {
  int idle = 0, cached = 0;
  size_t unused = 0;
  for (int i = 0; i < size(); ++i) {
    invariant(blocks_[i].refs == refs[i], "a block's references are not its readers");
    const bool is_cached = blocks_[i].id != 0;
    if (is_cached) invariant(find(blocks_[i].parent, tokens(i)) == i, "a cached block is lost");
    cached += is_cached;
    idle += is_cached && refs[i] == 0;
    unused += !is_cached && refs[i] == 0;
  }
  invariant(cached == cached_ && idle == idle_, "cached blocks are miscounted");
  invariant(unused == free_.size(), "a block is neither free nor in use");
  int seen = 0;
  for (int i = oldest_; i >= 0; i = blocks_[i].newer) ++seen;
  invariant(seen == idle_, "the list of idle blocks is broken");
}

}  // namespace effinfer::engine
