#include "engine/sampler/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "base/parallel.h"

namespace effinfer::engine {
namespace {

constexpr Kernel<RowKernelsFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, row_kernels_avx512},
    {"avx2", kAvx2, row_kernels_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, row_kernels_neon},
#endif
    {"scalar", kScalar, row_kernels_scalar},
};

constexpr int64_t kGrainElements = 16384;  // about 5 us: less is not worth waking a thread
// Most probable tokens that are looked at first where top-k doesn't say how many, and how many more
// when they are too few.
constexpr int64_t kFirstCandidates = 64, kMore = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// splitmix64's finalizer (Steele, Lea and Flood 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// A worker's.
struct Scratch {
  Scratch(void* memory, int64_t vocab)
      : cumulative(static_cast<double*>(memory)),
        scores(reinterpret_cast<float*>(cumulative + vocab + 1)),
        sorted(scores + vocab),
        which(reinterpret_cast<int32_t*>(sorted + vocab)),
        counts(which + vocab) {}
  double* cumulative;  // [vocab + 1]
  float *scores, *sorted;
  int32_t *which, *counts;
};

class RowSampler {
 public:
  RowSampler(const SampleRow& row, int64_t vocab, void* scratch)
      : kernels_(row_kernels()),
        row_(row),
        s_(*row.sampling),
        vocab_(vocab),
        scratch_(scratch, vocab) {}

  int32_t token() {
    x_ = processed();
    largest_ = kernels_.group_maxima(x_, vocab_, maxima_);
    if (!std::isfinite(largest_)) return -1;
    if (s_.temperature == 0) {
      kernels_.at_least(x_, vocab_, largest_, scratch_.which, 1);
      return scratch_.which[0];
    }
    const bool by_rank = top_k() > 0 || s_.top_p < 1;
    if (!by_rank && s_.min_p == 0) return draw_from_all();
    float least = by_rank ? least_by_rank() : -kInfinity;
    if (s_.min_p > 0)
      least = std::max(least, static_cast<float>(largest_ + std::log(s_.min_p) * s_.temperature));
    if (!by_rank) candidates_ = kernels_.at_least(x_, vocab_, least, scratch_.which, vocab_);
    return draw_from_candidates(least);
  }

 private:
  int64_t top_k() const { return s_.top_k < vocab_ ? s_.top_k : 0; }
  double weight(float x) const { return std::exp((double{x} - largest_) / s_.temperature); }
  // The token sampled from a row is the one at the next position.
  double chance() const { return uniform(s_.seed, row_.position + 1); }

  // The logits with penalties, and without stop tokens that come too early.
  const float* processed() {
    const bool early = !s_.stop_ids.empty() && row_.position + 1 - s_.prompt < s_.min_tokens;
    if (!early && !s_.penalized()) return row_.logits;
    std::copy_n(row_.logits, vocab_, scratch_.scores);
    if (s_.penalized()) penalize();
    if (early)
      for (const int32_t id : s_.stop_ids)
        if (id < vocab_) scratch_.scores[id] = -kInfinity;
    return scratch_.scores;
  }

  void penalize() {
    float* const scores = scratch_.scores;
    int32_t* const counts = scratch_.counts;
    const auto each = [&](int64_t from, auto see) {
      for (int64_t i = from; i < row_.length; ++i)
        if (const int32_t id = row_.history[i]; id >= 0 && id < vocab_) see(id);
    };
    if (s_.repetition != 1) {
      const float penalty = static_cast<float>(s_.repetition);
      each(0, [&](int32_t id) {  // from the logit as it was: a token that repeats is penalized once
        const float x = row_.logits[id];
        scores[id] = x < 0 ? x * penalty : x / penalty;
      });
    }
    if (s_.presence == 0 && s_.frequency == 0) return;
    each(s_.prompt, [&](int32_t id) { counts[id] = 0; });
    each(s_.prompt, [&](int32_t id) { ++counts[id]; });
    each(s_.prompt, [&](int32_t id) {
      if (counts[id] > 0) scores[id] -= static_cast<float>(s_.presence + s_.frequency * counts[id]);
      counts[id] = 0;
    });
  }

  // A value that at least `count` logits reach, and few more.
  float reached_by(int64_t count) {
    if (count >= vocab_) return -kInfinity;
    // As many groups have a maximum that reaches the count-th largest of the maxima.
    const bool by_groups = vocab_ > kGroups && count <= kGroups / 2;
    float* const values = scratch_.sorted;
    const int64_t n = by_groups ? kGroups : vocab_;
    std::copy_n(by_groups ? maxima_ : x_, n, values);
    std::nth_element(values, values + count - 1, values + n, std::greater<>());
    return values[count - 1];
  }

  // The smallest logit that top-k and then top-p leave.
  float least_by_rank() {
    const double all = top_k() > 0 ? 0 : total();
    for (int64_t count = top_k() > 0 ? top_k() : kFirstCandidates;; count *= kMore) {
      const float bound = reached_by(count);
      candidates_ = kernels_.at_least(x_, vocab_, bound, scratch_.which, vocab_);
      float* const sorted = scratch_.sorted;
      for (int64_t i = 0; i < candidates_; ++i) sorted[i] = x_[scratch_.which[i]];
      std::sort(sorted, sorted + candidates_, std::greater<>());
      if (top_k() == 0) {
        if (const auto last = last_inside(candidates_, all)) return *last;
        if (candidates_ == vocab_) return sorted[vocab_ - 1];
        continue;
      }
      const float kth = sorted[top_k() - 1];
      if (s_.top_p == 1) return kth;
      int64_t ranked = top_k();  // with the equals of the k-th
      while (ranked < candidates_ && sorted[ranked] == kth) ++ranked;
      double kept = 0;
      for (int64_t i = 0; i < ranked; ++i) kept += weight(sorted[i]);
      return last_inside(ranked, kept).value_or(kth);
    }
  }

  // Of the first `count` candidates, the one with which top_p of `all` is reached; none if they
  // weigh less.
  std::optional<float> last_inside(int64_t count, double all) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      sum += weight(scratch_.sorted[i]);
      if (sum >= s_.top_p * all) return scratch_.sorted[i];
    }
    return std::nullopt;
  }

  // The weights' sum; cumulative holds the blocks'.
  double total() {
    kernels_.weigh(x_, vocab_, largest_, static_cast<float>(1 / s_.temperature),
                   scratch_.cumulative);
    double sum = 0;
    for (int64_t block = 0; block * kBlock < vocab_; ++block) sum += scratch_.cumulative[block];
    return sum;
  }

  // The first token whose cumulative weight exceeds the random share of all: one of weight zero
  // never does. Where rounding leaves none, the last that weighs something.
  int32_t draw_from_all() {
    const double aim = chance() * total();
    double before = 0;
    int64_t chosen = 0;
    for (int64_t block = 0; block * kBlock < vocab_; ++block) {
      if (scratch_.cumulative[block] == 0) continue;
      chosen = block;
      if (before + scratch_.cumulative[block] > aim) break;
      before += scratch_.cumulative[block];
    }
    int32_t token = 0;
    const int64_t end = std::min(vocab_, (chosen + 1) * kBlock);
    for (int64_t i = chosen * kBlock; i < end; ++i) {
      const double own = weight(x_[i]);
      if (own == 0) continue;
      token = static_cast<int32_t>(i);
      before += own;
      if (before > aim) break;
    }
    return token;
  }

  int32_t draw_from_candidates(float least) {
    double sum = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < candidates_; ++i) {
      const int32_t id = scratch_.which[i];
      if (x_[id] < least) continue;
      sum += weight(x_[id]);
      scratch_.which[kept] = id;
      scratch_.cumulative[kept++] = sum;
    }
    const double* const first = scratch_.cumulative;
    const int64_t at = std::upper_bound(first, first + kept, chance() * sum) - first;
    return scratch_.which[std::min(at, kept - 1)];
  }

  const RowKernels& kernels_;
  const SampleRow& row_;
  const Sampling& s_;
  const int64_t vocab_;
  const Scratch scratch_;
  const float* x_ = nullptr;
  float maxima_[kGroups];
  float largest_ = 0;
  int64_t candidates_ = 0;  // in scratch_.which
};

}  // namespace

const RowKernels& row_kernels() { return pick(kKernels).run(); }

double uniform(uint64_t seed, int64_t position) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const uint64_t bits = mix(mix(seed + kGolden) + kGolden * (static_cast<uint64_t>(position) + 1));
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

size_t sample_scratch(int64_t vocab) {
  const size_t bytes = (vocab + 1) * sizeof(double) + 2 * vocab * (sizeof(float) + sizeof(int32_t));
  return (bytes + 63) / 64 * 64;
}

void sample(const SampleRow* rows, int64_t count, int64_t vocab, void* scratch, int32_t* tokens) {
  parallel_ranges(count, 1 + kGrainElements / vocab,
                  [&](int64_t begin, int64_t end, int64_t worker) {
                    void* const own = static_cast<char*>(scratch) + worker * sample_scratch(vocab);
                    for (int64_t i = begin; i < end; ++i)
                      tokens[i] = RowSampler(rows[i], vocab, own).token();
                  });
}

void most_probable(const float* logits, int64_t rows, int64_t vocab, int64_t stride,
                   int32_t* tokens) {
  const RowKernels& kernels = row_kernels();
  parallel_ranges(rows, 1 + 4 * kGrainElements / vocab, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const x = logits + row * stride;
      float maxima[kGroups];
      const float largest = kernels.group_maxima(x, vocab, maxima);
      tokens[row] = -1;
      if (std::isfinite(largest)) kernels.at_least(x, vocab, largest, tokens + row, 1);
    }
  });
}

}  // namespace effinfer::engine
