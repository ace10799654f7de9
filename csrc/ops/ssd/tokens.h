// Which positions of a sequence are tokens, and where snapshots are due: shared by the kernels.
#pragma once
#include "ops/ssd/ssd.h"

namespace effinfer {
namespace {

// Runs over the tokens of one sequence; masked positions are passed over, and a run never spans a
// change of seq_idx.
class TokenWalk {
 public:
  static constexpr int64_t kNotLast = int64_t{1} << 62;

  int64_t row;          // batch row of the sequence
  int64_t after = 0;    // tokens that follow the current run; kNotLast unless its id is the last
  bool restart = true;  // the current run begins the sequence, or a new id
  bool first = true;    // the current run begins the sequence: from the initial state, not zeros

  TokenWalk(const Ssd& a, int64_t sequence)
      : row(a.cu_seqlens != nullptr ? 0 : sequence),
        begin_(a.cu_seqlens != nullptr ? a.cu_seqlens[sequence] : 0),
        end_(a.cu_seqlens != nullptr ? a.cu_seqlens[sequence + 1] : a.length),
        mask_step_(a.mask_strides[1]),
        id_step_(a.seq_idx_strides[1]) {
    if (a.mask != nullptr) mask_ = a.mask + row * a.mask_strides[0];
    if (a.seq_idx != nullptr) ids_ = a.seq_idx + row * a.seq_idx_strides[0];
    rewind();
    last_begin_ = begin_;
    left_ = 0;
    int64_t at = end_ - 1;
    while (at >= begin_ && !is_token(at)) --at;
    const int32_t last_id = at >= begin_ ? id(at) : 0;
    if (mask_ == nullptr && ids_ == nullptr) {
      left_ = end_ - begin_;
    } else {
      for (; at >= begin_; --at) {
        if (!is_token(at)) continue;
        if (id(at) != last_id) {
          last_begin_ = at + 1;
          break;
        }
        ++left_;
      }
    }
    last_count_ = left_;
  }

  // Back to the start: every head walks the same tokens.
  void rewind() {
    at_ = begin_;
    left_ = last_count_;
    started_ = false;
  }

  // Positions of the next `most` tokens at most, all of one id; 0 at the end of the sequence.
  int64_t next(int64_t most, int64_t* positions) {
    int64_t n = 0;
    for (; at_ < end_ && n < most; ++at_) {
      if (!is_token(at_)) continue;
      const int32_t here = id(at_);
      if (n > 0 && here != id_) break;
      if (n == 0) {
        first = !started_;
        restart = first || here != id_;
        id_ = here;
        started_ = true;
      }
      positions[n++] = at_;
    }
    if (n == 0) return 0;
    if (positions[0] >= last_begin_) {
      left_ -= n;
      after = left_;
    } else {
      after = kNotLast;
    }
    return n;
  }

  bool is_token(int64_t at) const { return mask_ == nullptr || mask_[at * mask_step_] != 0; }
  bool is_masked() const { return mask_ != nullptr; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  int32_t id(int64_t at) const { return ids_ == nullptr ? 0 : ids_[at * id_step_]; }

  int64_t begin_, end_, mask_step_, id_step_;
  const uint8_t* mask_ = nullptr;
  const int32_t* ids_ = nullptr;
  int64_t last_begin_ = 0, last_count_ = 0;  // first position and tokens of the last id
  int64_t at_ = 0, left_ = 0;
  int32_t id_ = 0;
  bool started_ = false;
};

inline float* last_state(const Ssd& a, int64_t sequence, int64_t head) {
  return a.last_state + (sequence * a.heads + head) * a.head_dim * a.state_dim;
}

// The k-th newest snapshot of a head.
inline float* snapshot(const Ssd& a, int64_t sequence, int64_t k, int64_t head) {
  return a.snapshots +
         ((sequence * a.snapshot_count + k) * a.heads + head) * a.head_dim * a.state_dim;
}

inline const float* initial_state(const Ssd& a, int64_t sequence, int64_t head) {
  if (a.initial_state == nullptr) return nullptr;
  return a.initial_state + (sequence * a.heads + head) * a.head_dim * a.state_dim;
}

// A state copied, or zeros for none.
inline void copy_state(const Ssd& a, const float* from, float* to) {
  const auto bytes = static_cast<size_t>(a.head_dim * a.state_dim) * sizeof(float);
  if (from == nullptr)
    __builtin_memset(to, 0, bytes);
  else if (from != to)
    __builtin_memcpy(to, from, bytes);
}

// Snapshots from before the first of `tokens` tokens: all the state they start from.
inline void snapshot_start(const Ssd& a, int64_t sequence, int64_t head, int64_t tokens,
                           const float* start) {
  for (int64_t k = tokens; k < a.snapshot_count; ++k)
    copy_state(a, start, snapshot(a, sequence, k, head));
}

// y is 0 where the mask is 0.
inline void zero_masked(const Ssd& a, const TokenWalk& walk, int64_t head_begin, int64_t head_end) {
  if (!walk.is_masked()) return;
  with_type(a.x_type, [&](auto zero) {
    for (int64_t at = walk.begin(); at < walk.end(); ++at) {
      if (walk.is_token(at)) continue;
      for (int64_t head = head_begin; head < head_end; ++head)
        for (int64_t p = 0; p < a.head_dim; ++p)
          static_cast<decltype(zero)*>(a.y)[walk.row * a.y_strides[0] + at * a.y_strides[1] +
                                            head * a.y_strides[2] + p * a.y_strides[3]] = zero;
    }
  });
}

}  // namespace
}  // namespace effinfer
