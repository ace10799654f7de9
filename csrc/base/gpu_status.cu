#include <cuda_runtime.h>

#include "base/gpu_status.h"

namespace effinfer::gpu {

const char* status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

DeviceGuard::DeviceGuard(int device) {
  int current = device;
  if (cudaGetDevice(&current) == cudaSuccess && current != device &&
      cudaSetDevice(device) == cudaSuccess)
    before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace effinfer::gpu
