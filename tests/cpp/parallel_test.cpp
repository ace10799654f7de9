#include "base/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base/thread_pool.h"

namespace effinfer {
namespace {

class ParallelTest : public ::testing::Test {
 protected:
  void TearDown() override {
    set_pool(nullptr);
    set_num_threads(0);
  }
};

// Plain ints on purpose: ThreadSanitizer sees it when two threads run one chunk, or when the caller
// returns before the work is done.
void expect_each_chunk_once(int64_t chunks) {
  std::vector<int> seen(chunks);
  std::vector<int> busy(num_threads());
  parallel_for(chunks, [&](int64_t chunk, int64_t worker) {
    ASSERT_LT(worker, static_cast<int64_t>(busy.size()));
    EXPECT_EQ(busy[worker]++, 0) << "two threads share a scratch slot";
    ++seen[chunk];
    --busy[worker];
  });
  for (int64_t i = 0; i < chunks; ++i) EXPECT_EQ(seen[i], 1) << "chunk " << i << " of " << chunks;
}

TEST_F(ParallelTest, RunsEachChunkOnce) {
  for (int threads : {1, 2, 5}) {
    set_pool(thread_pool(threads));
    EXPECT_EQ(num_threads(), threads);
    for (int64_t chunks : {0, 1, 2, 4, 97}) expect_each_chunk_once(chunks);
  }
}

TEST_F(ParallelTest, WorksWithoutAPoolAndWithALimit) {
  set_pool(nullptr);
  EXPECT_EQ(num_threads(), 1);
  expect_each_chunk_once(10);
  set_pool(thread_pool(4));
  set_num_threads(2);
  EXPECT_EQ(num_threads(), 2);
  expect_each_chunk_once(10);
  set_num_threads(99);
  EXPECT_EQ(num_threads(), 4);
}

TEST_F(ParallelTest, RangesCoverAllItemsOnce) {
  set_pool(thread_pool(3));
  for (int64_t items : {0, 1, 7, 1000}) {
    for (int64_t grain : {1, 6, 5000}) {
      std::vector<int> seen(items);
      parallel_ranges(items, grain, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (int64_t i = 0; i < items; ++i) EXPECT_EQ(seen[i], 1);
    }
  }
}

TEST_F(ParallelTest, ServesSeveralCallersAtOnce) {
  set_pool(thread_pool(3));
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([] {
      for (int run = 0; run < 50; ++run) expect_each_chunk_once(20);
    });
  for (auto& caller : callers) caller.join();
}

TEST_F(ParallelTest, NestedRegionsFinish) {
  set_pool(thread_pool(3));
  std::vector<int> sums(6);
  parallel_for(6, [&](int64_t outer, int64_t) {
    std::atomic<int> sum{0};
    parallel_for(5, [&](int64_t inner, int64_t) { sum += static_cast<int>(inner); });
    sums[outer] = sum;
  });
  for (int sum : sums) EXPECT_EQ(sum, 10);
}

TEST_F(ParallelTest, ThePoolCanChangeItsSize) {
  for (int threads : {3, 1, 4, 2, 0}) {
    set_pool(thread_pool(threads));
    EXPECT_EQ(num_threads(), threads < 1 ? 1 : threads);
    expect_each_chunk_once(30);
  }
}

}  // namespace
}  // namespace effinfer
