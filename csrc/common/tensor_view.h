// A tensor as the kernels see it: pointer, sizes, strides, dtype. Tensors arrive through the DLPack C exchange API; the
// structs below are the DLPack 1.x ABI, written out because only their layout is needed. A view does not own: it lives
// as long as the Python call that passed the tensor.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/types.h"

namespace mk {

namespace dlpack {
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* previous;
};
struct ExchangeAPI {
  ExchangeHeader header;
  void *allocator, *from_py;
  int (*to_py)(Managed* tensor, void** py_object);  // which owns the tensor from then on
  int (*view)(void* py_object, Tensor* out);        // non-owning; may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};
enum : int32_t { kCPU = 1, kCUDA = 2 };

inline const ExchangeAPI*& exchange() {
  static const ExchangeAPI* api = nullptr;
  return api;
}

// Takes torch.Tensor.__dlpack_c_exchange_api__, once, at import.
inline void bind_exchange(const pybind11::capsule& capsule) {
  auto* api = capsule.get_pointer<ExchangeAPI>();
  while (api && api->header.major > 1) api = reinterpret_cast<ExchangeAPI*>(api->header.previous);
  if (!api || api->header.major != 1 || !api->view)
    throw pybind11::import_error("memkernels: torch's DLPack exchange API has no version 1");
  exchange() = api;
}
}  // namespace dlpack

inline DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  switch (type.code << 8 | type.bits) {
    case 2 << 8 | 64:
      return DType::float64;
    case 2 << 8 | 32:
      return DType::float32;
    case 4 << 8 | 16:
      return DType::bfloat16;
    case 2 << 8 | 16:
      return DType::float16;
    case 6 << 8 | 8:
      return DType::boolean;
    case 0 << 8 | 64:
      return DType::int64;
    case 0 << 8 | 32:
      return DType::int32;
    case 0 << 8 | 8:
      return DType::int8;
    default:
      return DType::other;
  }
}

inline const char* dtype_name(DType type) {
  static const char* const names[] = {"float64", "float32", "bfloat16", "float16",          "bool",
                                      "int64",   "int32",   "int8",     "unsupported dtype"};
  return names[int(type)];
}

inline int64_t item_size(DType type) {
  static const int64_t sizes[] = {8, 4, 2, 2, 1, 8, 4, 1, 0};
  return sizes[int(type)];
}

class TensorView {
 public:
  TensorView() : tensor_{} {}
  bool defined() const { return defined_; }
  void mark_defined() { defined_ = true; }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int axis) const { return tensor_.shape[axis]; }
  // Of an axis with one element the stride is never used: 0, so that no arithmetic on a strange one can overflow.
  int64_t stride(int axis) const { return tensor_.shape[axis] == 1 ? 0 : tensor_.strides[axis]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim(); i++) n *= size(i);
    return n;
  }
  DType dtype() const { return dtype_of(tensor_.dtype); }
  dlpack::Device device() const { return tensor_.device; }
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  template <class T>
  T* data() const {
    return static_cast<T*>(data());
  }
  dlpack::Tensor* raw() { return &tensor_; }

 private:
  dlpack::Tensor tensor_;
  bool defined_ = false;
};

// An input of a kernel that needs the last dimension as a run of memory: a tensor in which it is strided is copied, and
// the copy lives as long as the view.
class InputView : public TensorView {
 public:
  bool inner_strided() const {
    const int last = ndim() - 1;
    return defined() && last >= 0 && size(last) > 1 && stride(last) != 1;
  }
  pybind11::object copy;
};

}  // namespace mk

namespace pybind11::detail {
// None becomes an undefined view.
inline void load_view(handle source, mk::TensorView& view) {
  if (source.is_none()) return;
  const auto* api = mk::dlpack::exchange();
  if (!api) throw import_error("memkernels: bind() has not been called");
  if (api->view(source.ptr(), view.raw()) != 0) {
    PyErr_Clear();
    throw type_error("expected a dense torch.Tensor or None, got " +
                     std::string(str(type::handle_of(source).attr("__name__"))));
  }
  view.mark_defined();
}

template <>
struct type_caster<mk::TensorView> {
  PYBIND11_TYPE_CASTER(mk::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    load_view(source, value);
    return true;
  }
};

template <>
struct type_caster<mk::InputView> {
  PYBIND11_TYPE_CASTER(mk::InputView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    load_view(source, value);
    if (!value.inner_strided()) return true;
    value.copy = source.attr("contiguous")();
    load_view(value.copy, value);
    return true;
  }
};
}  // namespace pybind11::detail
