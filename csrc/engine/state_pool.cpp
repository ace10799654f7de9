#include "engine/state_pool.h"

#include <algorithm>

#include "engine/errors.h"

namespace effinfer::engine {

StatePool::StatePool(int num_states) : slots_(num_states) {
  for (int slot = num_states - 1; slot >= 0; --slot) free_.push_back(slot);
}

int StatePool::take() {
  if (free_.empty()) {
    int oldest = -1;
    for (int i = 0; i < size(); ++i)
      if (slots_[i].refs == 0 && (oldest < 0 || slots_[i].used < slots_[oldest].used)) oldest = i;
    slots_[oldest] = Slot();
    --idle_;
    free_.push_back(oldest);
  }
  const int slot = free_.back();
  free_.pop_back();
  slots_[slot].refs = 1;
  return slot;
}

void StatePool::ref(int slot) {
  if (slots_[slot].refs++ == 0) --idle_;
}

void StatePool::unref(int index) {
  Slot& slot = slots_[index];
  if (--slot.refs > 0) return;
  slot.used = ++clock_;
  if (slot.length > 0)
    ++idle_;
  else
    free_.push_back(index);
}

void StatePool::publish(int slot, const Tokens& tokens, int length) {
  if (find(tokens.get(), length).length == length) return;
  slots_[slot].tokens = tokens;
  slots_[slot].length = length;
}

StatePool::Snapshot StatePool::find(const int32_t* tokens, int limit) const {
  Snapshot best;
  for (int i = 0; i < size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.length > best.length && slot.length <= limit &&
        std::equal(tokens, tokens + slot.length, slot.tokens.get()))
      best = {i, slot.length};
  }
  return best;
}

void StatePool::check(const std::vector<int>& refs) const {
  int idle = 0;
  size_t unused = 0;
  for (int i = 0; i < size(); ++i) {
    invariant(slots_[i].refs == refs[i], "a state slot's references are not its readers");
    idle += refs[i] == 0 && slots_[i].length > 0;
    unused += refs[i] == 0 && slots_[i].length == 0;
  }
  invariant(idle == idle_ && unused == free_.size(), "state slots are miscounted");
}

}  // namespace effinfer::engine
