// The CPU shim itself: indices, barriers, shuffles, shared memory, and what it says about kernels
// that would hang or read garbage on a GPU.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/gpu.h"

namespace effinfer {
namespace {

__global__ void write_index(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x + threadIdx.x] = static_cast<int>(block * 1000 + threadIdx.x);
}

TEST(Shim, RunsEveryThreadOfEveryBlockOnce) {
  std::vector<int> out(2 * 3 * 2 * 64, -1);
  ASSERT_EQ(gpu::launch(&write_index, dim3(2, 3, 2), 64, 0, nullptr, out.data()), 0);
  for (int i = 0; i < static_cast<int>(out.size()); ++i) EXPECT_EQ(out[i], i / 64 * 1000 + i % 64);
  EXPECT_EQ(gpu::launch(&write_index, dim3(0), 64, 0, nullptr, static_cast<int*>(nullptr)), 0);
}

// Each thread reads what its mirror image wrote: wrong in either order without the barrier.
__global__ void mirror(float* out, bool with_barrier) {
  float* shared = gpu::shared<float>();
  const int i = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
  shared[i] = static_cast<float>(i);
  if (with_barrier) gpu::sync_block();
  out[i] = shared[last - i];
}

TEST(Shim, BarrierMakesSharedMemoryVisible) {
  std::vector<float> out(96);
  for (const bool reverse : {false, true}) {
    gpu::shim::set_reverse(reverse);
    ASSERT_EQ(gpu::launch(&mirror, dim3(1), 96, 96 * sizeof(float), nullptr, out.data(), true), 0);
    for (int i = 0; i < 96; ++i) EXPECT_EQ(out[i], 95 - i);
  }
  gpu::shim::set_reverse(false);
}

TEST(Shim, ReadBeforeTheBarrierIsNaNInOneOrderOrTheOther) {
  std::vector<float> out(64);
  ASSERT_EQ(gpu::launch(&mirror, dim3(1), 64, 64 * sizeof(float), nullptr, out.data(), false), 0);
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[63], 0.f);
  gpu::shim::set_reverse(true);
  ASSERT_EQ(gpu::launch(&mirror, dim3(1), 64, 64 * sizeof(float), nullptr, out.data(), false), 0);
  gpu::shim::set_reverse(false);
  EXPECT_EQ(out[0], 63.f);
  EXPECT_TRUE(std::isnan(out[63]));
}

__global__ void reduce(float* sums, float* ups, float* froms) {
  const auto x = static_cast<float>(threadIdx.x);
  const float total = gpu::block_sum(x, gpu::shared<float>());
  const float up = gpu::shuffle_up(x, 3), from = gpu::shuffle(x, 7);
  sums[threadIdx.x] = total;
  ups[threadIdx.x] = up;
  froms[threadIdx.x] = from;
}

TEST(Shim, ShufflesStayInTheirWarp) {
  std::vector<float> sums(128), ups(128), froms(128);
  ASSERT_EQ(gpu::launch(&reduce, dim3(1), 128, 4 * sizeof(float), nullptr, sums.data(), ups.data(),
                        froms.data()),
            0);
  for (int i = 0; i < 128; ++i) {
    EXPECT_EQ(sums[i], 127 * 128 / 2);
    EXPECT_EQ(ups[i], i % 32 < 3 ? i : i - 3);
    EXPECT_EQ(froms[i], i / 32 * 32 + 7);
  }
}

__global__ void exit_early(float* out) {
  if (threadIdx.x >= 40) return;
  gpu::sync_block();  // the threads that are left meet here, as on every GPU since sm_70
  out[threadIdx.x] = 1.f;
}

__global__ void diverge() {
  if (threadIdx.x < 5)
    gpu::sync_block();
  else
    gpu::sync_block();
}

__global__ void shuffle_in_part_of_a_warp(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = gpu::shuffle_xor(1.f, 1);
}

__global__ void never_meet() {
  if (threadIdx.x == 33)
    gpu::sync_warp();
  else
    gpu::sync_block();
}

std::string error_of(int status) {
  EXPECT_EQ(status, gpu::shim::kLaunchFailure);
  return gpu::shim::last_error();
}

TEST(Shim, ExitedThreadsDoNotHoldABarrier) {
  std::vector<float> out(64, 0.f);
  ASSERT_EQ(gpu::launch(&exit_early, dim3(1), 64, 0, nullptr, out.data()), 0);
  EXPECT_EQ(out[39], 1.f);
}

TEST(Shim, DivergentBarriersAreReported) {
  const std::string text = error_of(gpu::launch(&diverge, dim3(2), 64, 0, nullptr));
  EXPECT_NE(text.find("divergent barrier in block (0, 0, 0): thread 0 waits for the block at"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("thread 5 waits for the block at"), std::string::npos) << text;
}

TEST(Shim, ShuffleInPartOfAWarpIsReported) {
  std::vector<float> out(32);
  const std::string text =
      error_of(gpu::launch(&shuffle_in_part_of_a_warp, dim3(1), 32, 0, nullptr, out.data()));
  EXPECT_NE(text.find("thread 0 waits for its warp at"), std::string::npos) << text;
  EXPECT_NE(text.find("thread 16 has exited"), std::string::npos) << text;
}

TEST(Shim, DeadlockIsReportedAndTheNextLaunchRuns) {
  const std::string text = error_of(gpu::launch(&never_meet, dim3(1), 64, 0, nullptr));
  EXPECT_NE(text.find("thread 33 waits for its warp at"), std::string::npos) << text;
  std::vector<int> out(32);
  EXPECT_EQ(gpu::launch(&write_index, dim3(1), 32, 0, nullptr, out.data()), 0);
  EXPECT_EQ(out[31], 31);
}

TEST(Shim, ImpossibleLaunchesAreRefused) {
  std::vector<int> out(32);
  const auto launch = [&](dim3 grid, int threads, size_t shared) {
    return gpu::launch(&write_index, grid, threads, shared, nullptr, out.data());
  };
  EXPECT_EQ(launch(dim3(1), 33, 0), gpu::shim::kInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), 2048, 0), gpu::shim::kInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1), 32, 200 * 1024), gpu::shim::kInvalidConfiguration);
  EXPECT_EQ(launch(dim3(1, 70000), 32, 0), gpu::shim::kInvalidConfiguration);
}

TEST(Shim, SharedMemoryIsBoundsChecked) {
#if defined(__SANITIZE_ADDRESS__)
  std::vector<float> out(64);
  EXPECT_DEATH(static_cast<void>(gpu::launch(&mirror, dim3(1), 64, 63 * sizeof(float), nullptr,
                                             out.data(), true)),
               "heap-buffer-overflow");
#else
  GTEST_SKIP() << "needs AddressSanitizer";
#endif
}

}  // namespace
}  // namespace effinfer
