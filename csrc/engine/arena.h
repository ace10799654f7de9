// Rows of the hidden arena: where a position's hidden state waits between its loops. A span's rows
// are linked, so any free rows will do.
#pragma once
#include <vector>

namespace effinfer::engine {

class Arena {
 public:
  explicit Arena(int rows) : next_(rows), free_(rows) {
    for (int row = 0; row < rows; ++row) next_[row] = row + 1 < rows ? row + 1 : -1;
    head_ = rows > 0 ? 0 : -1;
  }

  int free() const { return free_; }
  int next(int row) const { return next_[row]; }

  // `rows` linked rows, of which there must be as many free.
  int take(int rows) {
    const int first = head_;
    int last = first;
    for (int i = 1; i < rows; ++i) last = next_[last];
    head_ = next_[last];
    next_[last] = -1;
    free_ -= rows;
    return first;
  }

  void give_one(int row) {
    next_[row] = head_;
    head_ = row;
    ++free_;
  }

  // A row and all linked behind it.
  void give(int row) {
    while (row >= 0) {
      const int next = next_[row];
      give_one(row);
      row = next;
    }
  }

 private:
  std::vector<int> next_;
  int head_ = -1;
  int free_;
};

}  // namespace effinfer::engine
