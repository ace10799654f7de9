// Python tensors in, checked views out. Every argument of every op passes through want() once; what
// it accepts, a kernel may rely on. The same binding files are compiled into the CPU module and,
// with EFFINFER_CUDA_MODULE, into the CUDA one (and into the CPU shim that runs the CUDA sources).
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "base/dtype.h"
#include "base/gpu_status.h"
#include "python/dlpack.h"
#include "python/module.h"

namespace effinfer {

constexpr int kMaxDims = 6;
constexpr int64_t kAny = -1;  // in a wanted shape: any size

// What an argument may hold, as bits.
enum Types : uint32_t {
  kF32 = 1,
  kBf16 = 2,
  kF16 = 4,
  kFloats = kF32 | kBf16 | kF16,
  kI32 = 8,
  kBool8 = 16,
  kC64 = 32,
  kU8 = 64,
  kI8 = 128,
  kOther = 256,  // anything else: only its element size is known
  kAnyType = kFloats | kI32 | kBool8 | kC64 | kU8 | kI8 | kOther,
};

// A borrowed, checked view; null when an optional argument was None.
struct Tensor {
  void* data = nullptr;
  int ndim = 0;
  uint32_t type = 0;
  int device_id = 0;
  int element_size = 0;  // in bytes
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  explicit operator bool() const { return ndim > 0; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  DType dtype() const {
    return type == kBf16 ? DType::bf16 : type == kF16 ? DType::f16 : DType::f32;
  }
  int64_t numel() const;
  bool is_contiguous() const;
};

// Says what class tensors are of. Called once, before anything else takes a tensor.
void use_tensor_type(py::handle type);

// The tensor as it is, checked to be a dense tensor on this module's device with an allowed type.
Tensor want(const char* op, const char* arg, py::handle object, uint32_t types);
// The same with a shape; kAny matches any size.
Tensor want(const char* op, const char* arg, py::handle object, uint32_t types,
            std::initializer_list<int64_t> shape);
// The same, where None gives a null tensor.
Tensor want_optional(const char* op, const char* arg, py::handle object, uint32_t types,
                     std::initializer_list<int64_t> shape);

// The same, for what a kernel reads as a plain array: it must be contiguous too.
Tensor want_dense(const char* op, const char* arg, py::handle object, uint32_t types,
                  std::initializer_list<int64_t> shape);
// The same, where None is refused.
Tensor want_array(const char* op, const char* arg, py::handle object, uint32_t types,
                  std::initializer_list<int64_t> shape);

// A tensor [..., dim] seen as rows of contiguous elements, one stride apart.
struct Rows {
  Tensor tensor;
  int64_t rows = 0, dim = 0, stride = 0;
  explicit operator bool() const { return static_cast<bool>(tensor); }
};
Rows want_rows(const char* op, const char* arg, py::handle object, uint32_t types,
               int64_t rows = kAny, int64_t dim = kAny, bool optional = false);

// Refuses tensors that an op writes and whose elements share memory.
void want_writable(const char* op, const char* arg, const Tensor& tensor);

// "op: arg must <expectation>, got <got>" as ValueError.
[[noreturn]] void reject(const char* op, const char* arg, const std::string& expectation,
                         const std::string& got);
std::string shape_text(const Tensor& tensor);

// Grow-only scratch of the calling thread, 64-byte aligned; valid until its next call.
void* workspace(size_t bytes);

// Scratch for a GPU module, from the allocator behind `like`, on its device: it is not used again
// before what was queued on the caller's stream by then has run. Null for no floats.
class DeviceScratch {
 public:
  DeviceScratch(py::handle like, int64_t floats);
  float* data() const { return data_; }

 private:
  py::object tensor_;
  float* data_ = nullptr;
};

// The caller's stream on `device_id`; null on the CPU.
void* current_stream(int device_id);

// Raises RuntimeError for a CUDA status other than success.
void check_status(const char* op, int status);

}  // namespace effinfer

// RUN(op, args, tensor): calls the op of this module's device with the GIL released.
#if defined(EFFINFER_CUDA_MODULE)
#define RUN(op, args, tensor)                                      \
  do {                                                             \
    void* stream = ::effinfer::current_stream((tensor).device_id); \
    int status;                                                    \
    {                                                              \
      ::effinfer::py::gil_scoped_release nogil;                    \
      ::effinfer::gpu::DeviceGuard device((tensor).device_id);     \
      status = ::effinfer::op##_cuda(args, stream);                \
    }                                                              \
    ::effinfer::check_status(#op, status);                         \
  } while (0)
#else
#define RUN(op, args, tensor)                 \
  do {                                        \
    ::effinfer::py::gil_scoped_release nogil; \
    ::effinfer::op(args);                     \
  } while (0)
#endif
