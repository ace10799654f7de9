// How selective_scan's GPU kernel divides a chunk among its threads, and brings its signals into
// shared memory.
#pragma once
#include "base/gpu.h"
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;
constexpr int kItems = 8;                   // tokens of a thread
constexpr int kLanes = 16;                  // threads side by side along time
constexpr int kChunk = kItems * kLanes;     // tokens
constexpr int kPair = 2;                    // channels of a thread
constexpr int kGroups = kThreads / kLanes;  // threads side by side along channels
constexpr int kChannels = kPair * kGroups;  // of a block
constexpr int kRow = kChunk + 4;            // a multiple of 4 that spreads rows over banks
constexpr int kTileStates = 16;             // states whose B and C are in shared memory
constexpr int kFill = kChannels * kChunk / kThreads;  // elements a thread loads of a tile
constexpr int kInFlight = 8;                          // of these at a time

static_assert(kThreads == kChunk && kTileStates == kChannels);

__device__ int slot(int token) {
  return token / 4 % 2 * (kChunk / 2) + token / kItems * 4 + token % 4;
}

__device__ void read(const float* row, int lane, float (&to)[kItems]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const gpu::Four four =
        *reinterpret_cast<const gpu::Four*>(row + half * (kChunk / 2) + lane * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[half * 4 + i] = four.v[i];
  }
}

// Where element i of a thread lies in a tile: neighbouring threads take neighbouring memory,
// whichever way it runs.
struct Place {
  int row, token;
  __device__ Place(bool across, int i)
      : row(across ? static_cast<int>(threadIdx.x) % kChannels : i),
        token(across ? static_cast<int>(threadIdx.x) / kChannels + i * (kThreads / kChannels)
                     : static_cast<int>(threadIdx.x)) {}
};

// tile[row][slot(token)] = prepare(element, row), 0 past the last row and token. The loads go first
// and are in flight together.
template <class F>
__device__ void fill(float (*tile)[kRow], const void* data, DType type, int64_t row_stride,
                     int64_t time_stride, int rows, const int* position, F&& prepare) {
  const bool across = row_stride == 1;
  with_type(type, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(data);
#pragma unroll 1
    for (int first = 0; first < kFill; first += kInFlight) {
      float got[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Place at(across, first + i);
        const int p = position[at.token];
        const bool in = p >= 0 && at.row < rows;
        got[i] = in ? gpu::load(from + at.row * row_stride + p * time_stride) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const Place at(across, first + i);
        const bool in = position[at.token] >= 0 && at.row < rows;
        tile[at.row][slot(at.token)] = in ? prepare(got[i], at.row) : 0.f;
      }
    }
  });
}

__device__ const void* offset(const void* data, DType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * size_of(type);
}

template <class F>
__device__ void fill(float (*tile)[kRow], const ScanSignal& x, int64_t batch, int64_t first,
                     int channels, const int* position, F&& prepare) {
  fill(tile, offset(x.data, x.type, batch * x.batch + first * x.channel), x.type, x.channel, x.time,
       channels, position, prepare);
}

}  // namespace
}  // namespace effinfer
