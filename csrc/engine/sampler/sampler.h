// Tokens from rows of logits: penalties, temperature, top-k, top-p, min-p, and a random number that
// is a function of the request's seed and the token's position alone.
//
// A row's token depends on that row alone: nothing is summed across rows, and each sum has one
// order per instruction set. Tokens as probable as the last one that a filter keeps are kept too.
// Cost: a row is read once for its largest values, once more for the candidates, and where neither
// top-k nor a filter's few candidates bound the sum, once for an exponential of each logit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/cpu.h"

namespace effinfer::engine {

// What a request asks of its tokens; as effinfer.SamplingParams, which checks it.
struct Sampling {
  double temperature = 0;  // 0: the most probable token
  int64_t top_k = 0;       // 0: all
  double top_p = 1, min_p = 0;
  double repetition = 1, presence = 0, frequency = 0;
  uint64_t seed = 0;
  int64_t prompt = 0;             // tokens of the prompt
  int64_t min_tokens = 0;         // before as many are generated,
  std::vector<int32_t> stop_ids;  // none of these is

  bool penalized() const { return repetition != 1 || presence != 0 || frequency != 0; }
};

struct SampleRow {
  const float* logits;
  const Sampling* sampling;
  int64_t position;        // of the token that was fed
  const int32_t* history;  // the sequence up to there; needed where it is penalized
  int64_t length;
};

// In [0, 1), with 53 random bits: the splitmix64 sequence of the mixed seed, at `position`.
double uniform(uint64_t seed, int64_t position);

// tokens[i] for rows[i]; -1 where the logits hold NaN or +inf, or nothing but -inf. `scratch` has
// sample_scratch(vocab) bytes for each of num_threads() workers.
void sample(const SampleRow* rows, int64_t count, int64_t vocab, void* scratch, int32_t* tokens);
size_t sample_scratch(int64_t vocab);

// The first of each row's most probable tokens; -1 likewise.
void most_probable(const float* logits, int64_t rows, int64_t vocab, int64_t stride,
                   int32_t* tokens);

// What reads whole rows, per instruction set.
constexpr int64_t kGroups = 256, kBlock = 64;
struct RowKernels {
  // maxima[g]: the largest of logits g, g + kGroups, ...; -inf for none. Gives the largest of all,
  // or NaN if there is one.
  float (*group_maxima)(const float* x, int64_t n, float* maxima);
  // Indices of values >= least, rising, `limit` at most; how many.
  int64_t (*at_least)(const float* x, int64_t n, float least, int32_t* which, int64_t limit);
  // sums[b]: of exp((x - largest) * scale) over block b of kBlock logits.
  void (*weigh)(const float* x, int64_t n, float largest, float scale, double* sums);
};
const RowKernels& row_kernels();

using RowKernelsFn = const RowKernels& (*)();
const RowKernels& row_kernels_scalar();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
const RowKernels& row_kernels_neon();

}  // namespace effinfer::engine
