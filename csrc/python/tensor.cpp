#include "python/tensor.h"

#include <cstdlib>
#include <new>

namespace effinfer {
namespace {

#if defined(EFFINFER_CUDA_MODULE) && !defined(EFFINFER_CUDA_SHIM)
constexpr int32_t kDevice = dlpack::kCuda;
constexpr const char* kDeviceName = "cuda";
#else
constexpr int32_t kDevice = dlpack::kCpu;
constexpr const char* kDeviceName = "cpu";
#endif

// The class of tensors and how to look into one, from use_tensor_type().
PyTypeObject* g_tensor_type = nullptr;
const dlpack::ExchangeTable* g_exchange_table = nullptr;

uint32_t type_of(dlpack::DataType t) {
  if (t.lanes != 1) return kOther;
  switch (t.code << 8 | t.bits) {
    case dlpack::kFloat << 8 | 32:
      return kF32;
    case dlpack::kFloat << 8 | 16:
      return kF16;
    case dlpack::kBfloat << 8 | 16:
      return kBf16;
    case dlpack::kInt << 8 | 32:
      return kI32;
    case dlpack::kUInt << 8 | 8:
      return kU8;
    case dlpack::kBool << 8 | 8:
      return kBool8;
    case dlpack::kComplex << 8 | 64:
      return kC64;
    case dlpack::kInt << 8 | 8:
      return kI8;
    default:
      return kOther;
  }
}

struct TypeName {
  uint32_t type;
  const char* name;
};
constexpr TypeName kTypeNames[] = {{kF32, "float32"}, {kBf16, "bfloat16"}, {kF16, "float16"},
                                   {kI32, "int32"},   {kBool8, "bool"},    {kC64, "complex64"},
                                   {kU8, "uint8"},    {kI8, "int8"}};

std::string type_names(uint32_t types) {
  std::string text;
  for (const auto& t : kTypeNames)
    if (types & t.type) text += (text.empty() ? "" : " or ") + std::string(t.name);
  return text;
}

std::string dims_text(const int64_t* dims, int n) {
  std::string text = "(";
  for (int i = 0; i < n; ++i) {
    if (i > 0) text += ", ";
    text += dims[i] == kAny ? "any" : std::to_string(dims[i]);
  }
  text += n == 1 ? ",)" : ")";
  return text;
}

}  // namespace

void use_tensor_type(py::handle type) {
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  auto* header = static_cast<dlpack::ExchangeHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->major != 1) header = header->prev;
  const auto* table = reinterpret_cast<dlpack::ExchangeTable*>(header);
  if (table == nullptr || table->view_from_object == nullptr)
    throw std::runtime_error("effinfer: these tensors offer no DLPack 1.x exchange table");
  g_tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());  // for the whole process
  g_exchange_table = table;
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
    expected *= shape[i];
  }
  return true;
}

void reject(const char* op, const char* arg, const std::string& expectation,
            const std::string& got) {
  throw py::value_error(std::string(op) + ": " + arg + " must " + expectation + ", got " + got);
}

std::string shape_text(const Tensor& t) { return dims_text(t.shape, t.ndim); }

Tensor want(const char* op, const char* arg, py::handle object, uint32_t types) {
  if (g_tensor_type == nullptr)
    throw std::runtime_error("effinfer: use_tensor_type() was not called on this module");
  dlpack::TensorView view;
  // The exchange function takes the object for a tensor without looking.
  const bool is_tensor = PyObject_TypeCheck(object.ptr(), g_tensor_type);
  if (!is_tensor || g_exchange_table->view_from_object(object.ptr(), &view) != 0) {
    PyErr_Clear();
    throw py::type_error(std::string(op) + ": " + arg + " must be a dense tensor, got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  if (view.ndim < 1 || view.ndim > kMaxDims)
    reject(op, arg, "have 1 to 6 dimensions", std::to_string(view.ndim));
  if (view.device.type != kDevice)
    reject(op, arg, std::string("be on device ") + kDeviceName,
           std::string(py::str(object.attr("device"))));
  Tensor t;
  t.type = type_of(view.dtype);
  if ((t.type & types) == 0)
    throw py::type_error(std::string(op) + ": " + arg + " must be " + type_names(types) + ", got " +
                         std::string(py::str(object.attr("dtype"))));
  t.ndim = view.ndim;
  t.device_id = view.device.id;
  t.element_size = (view.dtype.bits * view.dtype.lanes + 7) / 8;
  for (int i = 0; i < t.ndim; ++i) {
    t.shape[i] = view.shape[i];
    t.stride[i] = view.strides[i];
  }
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  if (view.data == nullptr && t.numel() > 0)
    throw py::type_error(std::string(op) + ": " + arg +
                         " must have memory of its own, got a fake or meta tensor");
  return t;
}

Tensor want(const char* op, const char* arg, py::handle object, uint32_t types,
            std::initializer_list<int64_t> shape) {
  const Tensor t = want(op, arg, object, types);
  bool fits = t.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t size : shape) {
    if (!fits) break;
    fits = size == kAny || size == t.shape[i];
    ++i;
  }
  if (!fits)
    reject(op, arg, "have shape " + dims_text(shape.begin(), static_cast<int>(shape.size())),
           shape_text(t));
  return t;
}

Tensor want_optional(const char* op, const char* arg, py::handle object, uint32_t types,
                     std::initializer_list<int64_t> shape) {
  return object.is_none() ? Tensor{} : want(op, arg, object, types, shape);
}

Tensor want_dense(const char* op, const char* arg, py::handle object, uint32_t types,
                  std::initializer_list<int64_t> shape) {
  const Tensor t = want_optional(op, arg, object, types, shape);
  if (t && !t.is_contiguous())
    reject(op, arg, "be contiguous", "strides " + dims_text(t.stride, t.ndim));
  return t;
}

Tensor want_array(const char* op, const char* arg, py::handle object, uint32_t types,
                  std::initializer_list<int64_t> shape) {
  if (object.is_none()) reject(op, arg, "be given", "None");
  return want_dense(op, arg, object, types, shape);
}

Rows want_rows(const char* op, const char* arg, py::handle object, uint32_t types, int64_t rows,
               int64_t dim, bool optional) {
  if (optional && object.is_none()) return {};
  Rows r;
  r.tensor = want(op, arg, object, types);
  const Tensor& t = r.tensor;
  r.dim = t.shape[t.ndim - 1];
  r.rows = 1;
  bool dense = t.stride[t.ndim - 1] == 1 || r.dim <= 1;
  for (int i = t.ndim - 2; i >= 0; --i) {  // merge the leading dimensions, innermost first
    if (t.shape[i] == 1) continue;
    if (r.rows == 1)
      r.stride = t.stride[i];
    else
      dense = dense && t.stride[i] == r.stride * r.rows;
    r.rows *= t.shape[i];
  }
  if (r.stride == 0 && r.rows == 1) r.stride = r.dim;
  if ((rows != kAny && r.rows != rows) || (dim != kAny && r.dim != dim))
    reject(op, arg,
           std::string("have ") +
               (rows == kAny ? std::string("any number of") : std::to_string(rows)) + " rows of " +
               (dim == kAny ? std::string("any number of") : std::to_string(dim)) + " elements",
           "shape " + shape_text(t));
  if (!dense && r.rows > 0 && r.dim > 0)
    reject(op, arg, "have contiguous elements and evenly spaced rows",
           "strides " + dims_text(t.stride, t.ndim) + " for shape " + shape_text(t));
  return r;
}

void want_writable(const char* op, const char* arg, const Tensor& t) {
  if (t.numel() == 0) return;
  int order[kMaxDims], n = 0;  // dimensions by rising stride
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    int at = n++;
    for (; at > 0 && t.stride[order[at - 1]] > t.stride[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  int64_t reach = 0;  // the last element that the dimensions so far lead to
  for (int i = 0; i < n; ++i) {
    if (t.stride[order[i]] <= reach)
      reject(op, arg, "not overlap itself (it is written in place)",
             "strides " + dims_text(t.stride, t.ndim) + " for shape " + shape_text(t));
    reach += (t.shape[order[i]] - 1) * t.stride[order[i]];
  }
}

void* workspace(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    const size_t size = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, size);
    if (data == nullptr) throw std::bad_alloc();
    std::free(buffer.data);
    buffer.data = data;
    buffer.size = size;
  }
  return buffer.data;
}

DeviceScratch::DeviceScratch(py::handle like, int64_t floats) {
  if (floats == 0) return;
  const Tensor example = want("scratch", "like", like, kAnyType);
  const int64_t elements = floats * static_cast<int64_t>(sizeof(float)) / example.element_size;
  tensor_ = like.attr("new_empty")(py::make_tuple(elements));
  data_ = static_cast<float*>(want("scratch", "scratch", tensor_, kAnyType).data);
}

void* current_stream(int device_id) {
  void* stream = nullptr;
  if (kDevice == dlpack::kCuda) g_exchange_table->current_stream(dlpack::kCuda, device_id, &stream);
  return stream;
}

void check_status([[maybe_unused]] const char* op, [[maybe_unused]] int status) {
#if defined(EFFINFER_CUDA_MODULE)
  if (status != 0)
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(status) + ": " +
                             gpu::status_text(status));
#endif
}

}  // namespace effinfer
