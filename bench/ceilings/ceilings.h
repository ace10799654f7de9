// The machine's ceilings: what no kernel can beat. Measured in the same run as the ops.
#pragma once
#include <cstdint>
#include <vector>

#include "base/cpu.h"

namespace effinfer::bench {

constexpr int kStreamCounts[] = {1, 2, 4, 8};

struct Ceilings {
  int threads;
  double read_gbs[4];  // by kStreamCounts; DRAM, huge pages, prefetched
  double best_read_gbs;
  double cache_gbs;  // 256 KB a thread, read again and again
  double fma_gflops;
  double dot_gops;  // int8 multiply-adds into 32 bits, two operations each
  double
      code_gops;  // the same of codes of at most 4 bits with int8, whose sums fit 16 bits a while
};

// Measures with `threads` threads on the current instruction set; takes about a second.
Ceilings measure_ceilings(int threads);

// One instruction set's measuring loops. Each returns a value that depends on all it did.
struct CeilingLoops {
  float (*read)(const float* data, int64_t floats, int streams);
  float (*fma)(int64_t rounds);     // kFmaPerRound * lanes FMAs a round
  int32_t (*dot)(int64_t rounds);   // dot_per_round int8 multiply-adds a round
  int32_t (*code)(int64_t rounds);  // code_per_round multiply-adds of small codes
  int64_t fma_per_round, dot_per_round, code_per_round;
};

const CeilingLoops& scalar_loops();
const CeilingLoops& avx2_loops();
const CeilingLoops& avx512_loops();
const CeilingLoops& neon_loops();
const CeilingLoops& neon_dotprod_loops();

}  // namespace effinfer::bench
