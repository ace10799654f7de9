// state_copy on a GPU: the blocks of one copy walk its state in units as large as its layout
// allows.
#include "base/gpu.h"
#include "ops/state_copy/state_copy.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kUnitsPerThread = 4, kMaxBlocksPerState = 64;

struct alignas(16) Sixteen {
  uint32_t words[4];
};

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy(StateCopy a, int64_t units) {
  const int64_t to = a.dst_slots[blockIdx.x], from = a.src_slots[blockIdx.x];
  if (to < 0 || from < 0 || to >= a.dst_pool || from >= a.src_pool) return;
  const int64_t per_run = a.run / static_cast<int64_t>(sizeof(Unit));
  const int64_t step = int64_t{gridDim.y} * kThreads;
  for (int64_t i = int64_t{blockIdx.y} * kThreads + threadIdx.x; i < units; i += step) {
    int64_t outer = i / per_run;
    int64_t dst = to * a.dst_slot + i % per_run * static_cast<int64_t>(sizeof(Unit));
    int64_t src = from * a.src_slot + i % per_run * static_cast<int64_t>(sizeof(Unit));
    for (int dim = kStateDims - 1; dim >= 0; --dim) {
      dst += outer % a.size[dim] * a.dst_stride[dim];
      src += outer % a.size[dim] * a.src_stride[dim];
      outer /= a.size[dim];
    }
    *reinterpret_cast<Unit*>(static_cast<char*>(a.dst) + dst) =
        *reinterpret_cast<const Unit*>(static_cast<const char*>(a.src) + src);
  }
}

// Whether every address and run is a multiple of `bytes`.
bool aligned(const StateCopy& a, int64_t bytes) {
  int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.dst)) |
                static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.src)) | a.run | a.dst_slot |
                a.src_slot;
  for (int dim = 0; dim < kStateDims; ++dim) all |= a.dst_stride[dim] | a.src_stride[dim];
  return all % bytes == 0;
}

template <class Unit>
int run(const StateCopy& a, void* stream) {
  int64_t units = a.run / static_cast<int64_t>(sizeof(Unit));
  for (int64_t size : a.size) units *= size;
  const int64_t wanted = (units + kThreads * kUnitsPerThread - 1) / (kThreads * kUnitsPerThread);
  const int64_t blocks = wanted < kMaxBlocksPerState ? wanted : kMaxBlocksPerState;
  const dim3 grid(static_cast<unsigned>(a.count), static_cast<unsigned>(blocks));
  return gpu::launch(&copy<Unit>, grid, kThreads, 0, stream, a, units);
}

}  // namespace

int state_copy_cuda(const StateCopy& args, void* stream) {
  if (aligned(args, 16)) return run<Sixteen>(args, stream);
  if (aligned(args, 4)) return run<uint32_t>(args, stream);
  return aligned(args, 2) ? run<uint16_t>(args, stream) : run<uint8_t>(args, stream);
}

}  // namespace effinfer
