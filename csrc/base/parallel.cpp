#include "base/parallel.h"

#include <pthread.h>

#include <atomic>

namespace effinfer {
namespace {

std::atomic<const Pool*> g_pool{nullptr};
std::atomic<int> g_limit{0};
// A child of fork() has only the forking thread: pools inherited from the parent would wait
// forever.
std::atomic<bool> g_forked{false};

struct Region {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> workers{0};
  int64_t chunks;
  detail::ChunkFn call;
  void* fn;
};

void work(int64_t, int64_t, void* ctx) {
  auto& region = *static_cast<Region*>(ctx);
  int64_t chunk = region.next.fetch_add(1, std::memory_order_relaxed);
  if (chunk >= region.chunks) return;
  const int64_t worker = region.workers.fetch_add(1, std::memory_order_relaxed);
  for (; chunk < region.chunks; chunk = region.next.fetch_add(1, std::memory_order_relaxed))
    region.call(region.fn, chunk, worker);
}

}  // namespace

void set_pool(const Pool* pool) {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });
  (void)registered;
  g_pool.store(pool, std::memory_order_release);
}

void set_num_threads(int n) { g_limit.store(n < 0 ? 0 : n, std::memory_order_relaxed); }

int num_threads() {
  const Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool == nullptr || g_forked.load(std::memory_order_relaxed)) return 1;
  const int limit = g_limit.load(std::memory_order_relaxed);
  const int offered = pool->threads();
  return limit > 0 && limit < offered ? limit : offered;
}

namespace detail {

void parallel_run(int64_t chunks, ChunkFn call, void* fn) {
  const int64_t threads = num_threads();
  if (chunks <= 1 || threads <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) call(fn, chunk, 0);
    return;
  }
  Region region;
  region.chunks = chunks;
  region.call = call;
  region.fn = fn;
  g_pool.load(std::memory_order_acquire)->run(threads < chunks ? threads : chunks, work, &region);
}

}  // namespace detail
}  // namespace effinfer
