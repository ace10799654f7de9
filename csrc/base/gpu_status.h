// What the bindings of a GPU module ask of the CUDA runtime (or of the shim in its place).
#pragma once

namespace effinfer::gpu {

// Text for a status that a launch returned.
const char* status_text(int status);

// Makes `device` current on this thread while it lives: a kernel runs on the current device, which
// need not be the one its tensors are on.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

}  // namespace effinfer::gpu
