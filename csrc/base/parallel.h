// Threads. An op splits its work into chunks; workers claim chunks from one atomic counter, so a
// descheduled worker delays nobody. Where the threads come from is the embedder's business: Python
// installs torch's own pool (a second spinning pool beside it costs 30x per region), the bench
// binary and the native tests install base/thread_pool.h.
#pragma once
#include <cstdint>
#include <type_traits>

namespace effinfer {

struct Pool {
  // Calls body(begin, end, ctx) so that the ranges cover [0, workers), on several threads if it
  // can.
  void (*run)(int64_t workers, void (*body)(int64_t begin, int64_t end, void* ctx), void* ctx);
  int (*threads)();
};

// Installs the pool; nullptr means the calling thread only.
void set_pool(const Pool* pool);

// Upper bound on the threads an op uses; 0 follows the pool.
void set_num_threads(int n);
int num_threads();

namespace detail {
using ChunkFn = void (*)(void* fn, int64_t chunk, int64_t worker);
void parallel_run(int64_t chunks, ChunkFn call, void* fn);
}  // namespace detail

// Runs fn(chunk, worker) for each chunk in [0, chunks). worker < num_threads() names the scratch
// slot this call may use. Which worker runs a chunk must not change the result.
template <class Fn>
inline void parallel_for(int64_t chunks, Fn&& fn) {
  detail::parallel_run(
      chunks,
      [](void* f, int64_t chunk, int64_t worker) {
        (*static_cast<std::remove_reference_t<Fn>*>(f))(chunk, worker);
      },
      &fn);
}

// Splits [0, items) into ranges of at least `grain` items, a few per thread, and runs fn(begin,
// end, worker) on each.
template <class Fn>
inline void parallel_ranges(int64_t items, int64_t grain, Fn&& fn) {
  if (items <= 0) return;
  const int64_t wanted = num_threads() > 1 ? int64_t{num_threads()} * 4 : 1;
  const int64_t by_grain = (items + grain - 1) / grain;
  const int64_t chunks = by_grain < wanted ? by_grain : wanted;
  const int64_t size = (items + chunks - 1) / chunks;
  parallel_for(chunks, [&](int64_t chunk, int64_t worker) {
    const int64_t begin = chunk * size;
    const int64_t end = begin + size < items ? begin + size : items;
    if (begin < end) fn(begin, end, worker);
  });
}

}  // namespace effinfer
