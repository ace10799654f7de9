// What linear's GPU kernels share: where outputs lie in a panel, what happens to a finished sum,
// and how many rows one launch takes.
#pragma once
#include <type_traits>

#include "base/gpu.h"
#include "ops/linear/linear.h"

namespace effinfer {
namespace {

using namespace linear_layout;

// Where output `lane` of a panel lies in its 16 elements.
template <class W>
__device__ int place(int lane) {
  return std::is_same_v<W, bf16> ? (lane < 8 ? 2 * lane : 2 * lane - 15) : lane;
}

__device__ inline float activate(Epilogue e, float x) {
  switch (e) {
    case Epilogue::silu:
    case Epilogue::silu_mul:
      return gpu::silu(x);
    case Epilogue::gelu:
    case Epilogue::gelu_mul:
      return 0.5f * x * (1.f + erff(x * 0.70710678f));
    case Epilogue::gelu_tanh:
      return x / (1.f + expf(-1.5957691216f * x * (1.f + 0.044715f * x * x)));
    default:
      return x;
  }
}

__device__ inline float finished(const Linear& a, int64_t row, int64_t n, float first,
                                 float second) {
  float v = activate(a.epilogue, first + (a.bias != nullptr ? a.bias[n] : 0.f));
  if (takes_two(a.epilogue)) v *= second + (a.bias != nullptr ? a.bias[a.n + n] : 0.f);
  if (a.residual != nullptr) v += gpu::load_any(a.residual, a.x_type, row * a.residual_stride + n);
  return v;
}

__device__ inline void finish(const Linear& a, int64_t row, int64_t n, float first, float second) {
  gpu::store_any(a.y, a.x_type, row * a.y_stride + n, finished(a, row, n, first, second));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Rows go along the grid's y, at most kMaxGridYZ tiles of them at a time: launch(part, row tiles).
template <class F>
int over_rows(const Linear& a, int64_t tile_rows, F&& launch) {
  const int64_t most = gpu::kMaxGridYZ * tile_rows;
  for (int64_t row = 0; row < a.rows; row += most) {
    Linear part = a;
    part.rows = a.rows - row < most ? a.rows - row : most;
    part.x = static_cast<const char*>(a.x) + row * a.x_stride * size_of(a.x_type);
    part.y = static_cast<char*>(a.y) + row * a.y_stride * size_of(a.x_type);
    if (a.residual != nullptr)
      part.residual =
          static_cast<const char*>(a.residual) + row * a.residual_stride * size_of(a.x_type);
    const int status = launch(part, static_cast<unsigned>(ceil_div(part.rows, tile_rows)));
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace
}  // namespace effinfer
