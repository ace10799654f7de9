// The part of the DLPack 1.x C ABI (github.com/dmlc/dlpack) this binding uses: a borrowed tensor
// view and the exchange table that torch >= 2.10 offers as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once
#include <cstdint>

namespace effinfer::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct TensorView {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* prev;
};

struct ExchangeTable {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, TensorView* out);  // borrows: valid while the object lives
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace effinfer::dlpack
