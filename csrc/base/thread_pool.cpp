#include "base/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace effinfer {
namespace {

class ThreadPool {
 public:
  ~ThreadPool() { resize(1); }

  void resize(int threads) {
    std::lock_guard<std::mutex> busy(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    // The generation of now, not of when the thread gets to run: a region may have begun by then,
    // and would wait forever for the worker that missed it.
    for (int i = 1; i < threads; ++i)
      workers_.emplace_back([this, i, seen = generation_] { loop(i, seen); });
    size_.store(threads, std::memory_order_relaxed);
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void run(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
    // A second caller does its work alone rather than wait for the pool.
    std::unique_lock<std::mutex> busy(run_mutex_, std::try_to_lock);
    if (!busy.owns_lock() || workers_.empty()) return body(0, n, ctx);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      ctx_ = ctx;
      helpers_ = static_cast<int>(n) - 1;
      pending_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    body(0, 1, ctx);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void loop(int id, uint64_t seen) {
    for (;;) {
      void (*body)(int64_t, int64_t, void*) = nullptr;
      void* ctx = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        if (id <= helpers_) body = body_;
        ctx = ctx_;
      }
      if (body != nullptr) body(id, id + 1, ctx);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::atomic<int> size_{1};
  uint64_t generation_ = 0;
  int helpers_ = 0, pending_ = 0;
  bool stop_ = false;
  void (*body_)(int64_t, int64_t, void*) = nullptr;
  void* ctx_ = nullptr;
};

ThreadPool& instance() {
  static ThreadPool pool;
  return pool;
}

constexpr Pool kPool = {
    [](int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
      instance().run(n, body, ctx);
    },
    [] { return instance().size(); },
};

}  // namespace

const Pool* thread_pool(int threads) {
  instance().resize(threads < 1 ? 1 : threads);
  return &kPool;
}

}  // namespace effinfer
