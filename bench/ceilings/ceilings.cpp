#include "ceilings/ceilings.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "base/parallel.h"
#include "timing.h"

namespace effinfer::bench {
namespace {

float scalar_read(const float* data, int64_t floats, int) {
  float total[8] = {};
  for (int64_t i = 0; i + 8 <= floats; i += 8)
    for (int k = 0; k < 8; ++k) total[k] += data[i + k];
  return total[0] + total[1] + total[2] + total[3] + total[4] + total[5] + total[6] + total[7];
}

float scalar_fma(int64_t rounds) {
  float acc[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t r = 0; r < rounds; ++r) {
    for (float& x : acc) x = x * 0.999f + 1e-3f;
    asm volatile("" ::: "memory");
  }
  return acc[0] + acc[1] + acc[2] + acc[3] + acc[4] + acc[5] + acc[6] + acc[7];
}

int32_t scalar_dot(int64_t rounds) {
  int32_t acc[8] = {};
  int8_t a = 3, b = -2;
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : "+r"(a), "+r"(b));
    for (int32_t& x : acc) x += a * b;
  }
  return acc[0] + acc[1] + acc[2] + acc[3] + acc[4] + acc[5] + acc[6] + acc[7];
}

struct Loops {
  uint32_t needs;
  const CeilingLoops& (*loops)();
};
constexpr Loops kLoops[] = {
#if defined(__x86_64__)
    {kAvx512, avx512_loops},
    {kAvx2, avx2_loops},
#elif defined(__aarch64__)
    {kDotprod, neon_dotprod_loops},
    {kNeon, neon_loops},
#endif
    {kScalar, scalar_loops},
};

const CeilingLoops& current_loops() {
  for (const auto& row : kLoops)
    if ((row.needs & isa_bits()) == row.needs) return row.loops();
  return scalar_loops();
}

std::atomic<float> g_sink;  // keeps results alive

// Seconds that `threads` workers need to run f(worker) once each.
template <class F>
double seconds_on(int threads, F f) {
  return median_seconds([&] { parallel_for(threads, [&](int64_t i, int64_t) { f(i); }); }, 0.1);
}

}  // namespace

const CeilingLoops& scalar_loops() {
  static const CeilingLoops loops = {scalar_read, scalar_fma, scalar_dot, scalar_dot, 8, 8, 8};
  return loops;
}

Ceilings measure_ceilings(int threads) {
  constexpr int64_t kFloats = int64_t{48} << 20;  // 192 MB: past any cache
  set_num_threads(threads);
  const CeilingLoops& loops = current_loops();
  Ceilings c{};
  c.threads = threads;

  const size_t bytes = kFloats * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) {
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    auto* data = static_cast<float*>(memory);
    std::fill(data, data + kFloats, 1.f);
    const int64_t part = kFloats / threads;
    for (int i = 0; i < 4; ++i) {
      const double seconds = seconds_on(threads, [&](int64_t t) {
        g_sink = loops.read(data + t * part, part, kStreamCounts[i]);
      });
      c.read_gbs[i] = static_cast<double>(bytes) / seconds / 1e9;
      c.best_read_gbs = std::max(c.best_read_gbs, c.read_gbs[i]);
    }
    constexpr int64_t kCached = 65536;
    constexpr int kTimes = 64;
    const double cached = seconds_on(threads, [&](int64_t t) {
      for (int again = 0; again < kTimes; ++again) g_sink = loops.read(data + t * part, kCached, 4);
    });
    c.cache_gbs = static_cast<double>(kCached * kTimes * threads) * 4 / cached / 1e9;
    munmap(memory, bytes);
  }

  constexpr int64_t kRounds = 200000;
  const auto giga_ops = [&](auto loop, int64_t per_round) {
    const double seconds =
        seconds_on(threads, [&](int64_t) { g_sink = static_cast<float>(loop(kRounds)); });
    return 2e-9 * static_cast<double>(per_round * kRounds * threads) / seconds;
  };
  c.fma_gflops = giga_ops(loops.fma, loops.fma_per_round);
  c.dot_gops = giga_ops(loops.dot, loops.dot_per_round);
  c.code_gops = giga_ops(loops.code, loops.code_per_round);
  return c;
}

}  // namespace effinfer::bench
