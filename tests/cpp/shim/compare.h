// Holds a kernel on the shim against the op's scalar kernel.
#pragma once
#include <functional>

#include "base/gpu_shim.h"
#include "testing.h"

namespace effinfer::testing {

using Floats = std::vector<float>;

// `scalar` and `cuda` each fill (or update) the buffers they are given a fresh copy of. The kernel
// runs with its threads in both orders, and must give the same bits: else a barrier is missing.
inline void expect_same(const std::vector<Floats>& buffers,
                        const std::function<void(std::vector<Floats>&)>& scalar,
                        const std::function<int(std::vector<Floats>&)>& cuda, double bound = 1e-6) {
  auto want = buffers, got = buffers, reversed = buffers;
  scalar(want);
  ASSERT_EQ(cuda(got), 0) << gpu::shim::last_error();
  gpu::shim::set_reverse(true);
  const int status = cuda(reversed);
  gpu::shim::set_reverse(false);
  ASSERT_EQ(status, 0) << gpu::shim::last_error();
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_LE(relative_error(got[i], {want[i].begin(), want[i].end()}), bound) << "buffer " << i;
    EXPECT_EQ(std::memcmp(got[i].data(), reversed[i].data(), got[i].size() * sizeof(float)), 0)
        << "buffer " << i << " depends on the order of the threads";
  }
}

}  // namespace effinfer::testing
