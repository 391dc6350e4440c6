#include "common/calls.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "common/block_pool.h"
#include "common/large_tensor.h"
#include "common/tensor_view.h"

namespace py = pybind11;

namespace mk {
namespace {

// Objects of Python; they live as long as the process.
struct Torch {
  PyTypeObject *tensor, *parameter;  // the classes of plain tensors
  std::vector<PyObject*> watchers;
  PyObject *forward_ad, *grad_enabled, *deterministic, *empty_strided, *general_empty;
  PyObject *current_level, *is_neg, *requires_grad, *dtype;  // names
};
Torch torch{};

PyObject* kept(const py::handle& object) { return object.inc_ref().ptr(); }

void bind_torch(const py::type& tensor, const py::type& parameter, const py::list& watchers,
                const py::object& forward_ad, const py::object& grad_enabled, const py::object& deterministic,
                const py::object& empty_strided, const py::object& general_empty) {
  torch.tensor = reinterpret_cast<PyTypeObject*>(kept(tensor));
  torch.parameter = reinterpret_cast<PyTypeObject*>(kept(parameter));
  for (const py::handle watcher : watchers) torch.watchers.push_back(kept(watcher));
  torch.forward_ad = kept(forward_ad), torch.grad_enabled = kept(grad_enabled);
  torch.deterministic = kept(deterministic);
  torch.empty_strided = kept(empty_strided), torch.general_empty = kept(general_empty);
  torch.current_level = PyUnicode_InternFromString("_current_level");
  torch.is_neg = PyUnicode_InternFromString("is_neg");
  torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.dtype = PyUnicode_InternFromString("dtype");
}

bool plain_tensor(PyObject* object) { return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter; }

bool plain_option(PyObject* object) {
  return object == Py_None || PyBool_Check(object) || PyFloat_CheckExact(object) || PyLong_CheckExact(object) ||
         PyUnicode_CheckExact(object);
}

bool view_of(PyObject* tensor, dlpack::Tensor* view) {
  if (!plain_tensor(tensor)) return false;
  if (dlpack::exchange()->view(tensor, view) == 0) return true;
  PyErr_Clear();
  return false;
}

// The truth of what a call returned; the result is consumed.
bool truth(PyObject* result) {
  if (!result) throw py::error_already_set();
  const int found = PyObject_IsTrue(result);
  Py_DECREF(result);
  if (found < 0) throw py::error_already_set();
  return found;
}

bool watched() {
  for (PyObject* watcher : torch.watchers)
    if (truth(PyObject_CallNoArgs(watcher))) return true;
  PyObject* level = PyObject_GetAttr(torch.forward_ad, torch.current_level);
  if (!level) throw py::error_already_set();
  const long value = PyLong_AsLong(level);
  Py_DECREF(level);
  return value >= 0;
}

enum Kind : long { kRouted, kPlain, kRecorded };

Kind kind_of(PyObject* args, Py_ssize_t inputs) {
  const Py_ssize_t n = PyTuple_GET_SIZE(args);
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* argument = PyTuple_GET_ITEM(args, i);
    if (!plain_tensor(argument) && !plain_option(argument)) return kRouted;
  }
  if (watched()) return kRouted;
  bool recorded = truth(PyObject_CallNoArgs(torch.grad_enabled)), asked = false;
  for (Py_ssize_t i = 0; i < std::min(inputs, n); i++) {
    PyObject* argument = PyTuple_GET_ITEM(args, i);
    if (!plain_tensor(argument)) continue;
    dlpack::Tensor
        view;  // of what has no memory of its own, such as a batch of tensors that looks like one, there is none
    if (!view_of(argument, &view) || truth(PyObject_CallMethodNoArgs(argument, torch.is_neg))) return kRouted;
    asked = asked || (recorded && truth(PyObject_GetAttr(argument, torch.requires_grad)));
  }
  return asked ? kRecorded : kPlain;
}

// Hands C++ exceptions over to Python: these functions are called the way Python calls its own, without pybind11's
// conversions.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* call_kind(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 2 || !PyTuple_Check(args[0])) return PyErr_Format(PyExc_TypeError, "call_kind: expected (args, inputs)");
  return guarded([&] { return PyLong_FromLong(kind_of(args[0], PyLong_AsSsize_t(args[1]))); });
}

PyObject* tensor_key(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  int64_t words[256];
  size_t n = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    if (n + 2 > std::size(words)) Py_RETURN_NONE;
    if (tensors[i] == Py_None) {
      words[n++] = -1;
      continue;
    }
    dlpack::Tensor view;
    if (!view_of(tensors[i], &view) || n + 2 + size_t(view.ndim) > std::size(words)) Py_RETURN_NONE;
    words[n++] = int64_t(view.ndim) << 32 | int64_t(view.dtype.code) << 24 | view.dtype.bits << 16 | view.dtype.lanes;
    words[n++] = int64_t(view.device.type) << 32 | uint32_t(view.device.id);
    n = size_t(std::copy_n(view.shape, view.ndim, words + n) - words);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), Py_ssize_t(n * sizeof(int64_t)));
}

// What the integers of a tensor must be: any from low to high; the first low, and none less than the one before; and
// the last high.
enum Order : long { kAny, kRising, kSpanning };

struct Integers {
  uint64_t low, high, wrong = 0, decreasing = 0;  // the top bits of these two tell
  uint64_t first = 0, before = 0;
  bool started = false;

  void see(const dlpack::Tensor& view, const int64_t* from, int axis) {
    if (axis < view.ndim - 1) {
      for (int64_t i = 0; i < view.shape[axis]; i++) see(view, from + i * view.strides[axis], axis + 1);
      return;
    }
    const int64_t count = view.ndim ? view.shape[axis] : 1, step = view.ndim ? view.strides[axis] : 1;
    if (count == 0) return;
    if (!started) first = before = uint64_t(from[0]), started = true;
    uint64_t outside = 0, falling = uint64_t(from[0]) - before;
    if (step == 1) {
      for (int64_t i = 0; i < count; i++) outside |= (uint64_t(from[i]) - low) | (high - uint64_t(from[i]));
      for (int64_t i = 1; i < count; i++) falling |= uint64_t(from[i]) - uint64_t(from[i - 1]);
    } else {
      for (int64_t i = 0; i < count; i++)
        outside |= (uint64_t(from[i * step]) - low) | (high - uint64_t(from[i * step]));
      for (int64_t i = 1; i < count; i++) falling |= uint64_t(from[i * step]) - uint64_t(from[(i - 1) * step]);
    }
    wrong |= outside, decreasing |= falling, before = uint64_t(from[(count - 1) * step]);
  }

  bool fit(long order) const {
    constexpr uint64_t kTop = uint64_t(1) << 63;
    if (wrong & kTop) return false;
    if (order == kAny) return true;
    return started && first == low && !(decreasing & kTop) && (order == kRising || before == high);
  }
};

PyObject* integers_fit(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 4) return PyErr_Format(PyExc_TypeError, "integers_fit: expected (tensor, low, high, order)");
  return guarded([&]() -> PyObject* {
    dlpack::Tensor view;
    if (!view_of(args[0], &view) || view.device.type != dlpack::kCPU || dtype_of(view.dtype) != DType::int64 ||
        watched())
      Py_RETURN_NONE;
    const long long low = PyLong_AsLongLong(args[1]), high = PyLong_AsLongLong(args[2]);
    const long order = PyLong_AsLong(args[3]);
    if (PyErr_Occurred()) return nullptr;
    Integers integers{uint64_t(low), uint64_t(high)};
    integers.see(view, reinterpret_cast<const int64_t*>(static_cast<char*>(view.data) + view.byte_offset), 0);
    return PyBool_FromLong(integers.fit(order));
  });
}

// (sizes, strides) of a contiguous tensor like `view`, or of these sizes; false where they are not plain integers.
bool layout_of(const dlpack::Tensor& view, PyObject* shape, py::tuple& sizes, py::tuple& strides) {
  const Py_ssize_t ndim = shape == Py_None ? view.ndim : PyTuple_Check(shape) ? PyTuple_GET_SIZE(shape) : -1;
  if (ndim < 0) return false;
  const bool ready = PyTuple_CheckExact(shape);  // torch takes no torch.Size here
  sizes = ready ? py::reinterpret_borrow<py::tuple>(shape) : py::tuple(size_t(ndim)), strides = py::tuple(size_t(ndim));
  int64_t stride = 1;
  for (Py_ssize_t i = ndim - 1; i >= 0; i--) {
    PyObject* given = shape == Py_None ? nullptr : PyTuple_GET_ITEM(shape, i);
    if (given && !PyLong_CheckExact(given)) return false;
    const int64_t size = given ? PyLong_AsLongLong(given) : view.shape[i];
    if (!ready) PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(size));
    PyTuple_SET_ITEM(strides.ptr(), i, PyLong_FromLongLong(stride));
    stride *= std::max<int64_t>(size, 1);
  }
  return true;
}

PyObject* general_empty(PyObject* like, PyObject* shape, PyObject* dtype) {
  PyObject* given[] = {like, shape, dtype};
  return PyObject_Vectorcall(torch.general_empty, given, 3, nullptr);
}

// Whether memory like that of a tensor can be had without torch's general way; deterministic torch fills fresh memory.
bool simple(PyObject* like, dlpack::Tensor* view) {
  return !truth(PyObject_CallNoArgs(torch.deterministic)) && view_of(like, view) && view->device.type == dlpack::kCPU;
}

// The element type that a torch.dtype stands for.
dlpack::DataType type_of(PyObject* dtype) {
  const py::tuple one = py::make_tuple(1);
  PyObject* given[] = {one.ptr(), one.ptr(), dtype};
  const auto tensor = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch.empty_strided, given, 3, nullptr));
  dlpack::Tensor view{};
  if (!tensor || dlpack::exchange()->view(tensor.ptr(), &view) != 0) throw py::error_already_set();
  return view.dtype;
}

// One of at least block_pool::kLeast bytes, in kept memory; null for a smaller one, or where there is none.
PyObject* large_empty(const py::tuple& sizes, const py::object& dtype) {
  constexpr int64_t kWidest = 16;  // bytes of an element
  const auto size = [&](size_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), Py_ssize_t(i))); };
  int64_t count = 1;
  for (size_t i = 0; i < sizes.size(); i++)
    if (size(i) < 0 || __builtin_mul_overflow(count, size(i), &count)) return PyErr_Clear(), nullptr;
  if (count < block_pool::kLeast / kWidest || count > INT64_MAX / kWidest) return nullptr;
  std::vector<int64_t> shape(sizes.size());
  for (size_t i = 0; i < shape.size(); i++) shape[i] = size(i);
  const dlpack::DataType type = type_of(dtype.ptr());
  const int64_t bytes = count * type.bits * type.lanes / 8;
  return bytes < block_pool::kLeast ? nullptr : large_tensor(shape.data(), int(shape.size()), type, bytes);
}

// `view` of `like`, or null where only the general way will do.
PyObject* empty_of(PyObject* like, PyObject* shape, PyObject* dtype, const dlpack::Tensor* view) {
  py::tuple sizes, strides;
  if (!view || !layout_of(*view, shape, sizes, strides)) return general_empty(like, shape, dtype);
  const auto own = dtype == Py_None ? py::reinterpret_steal<py::object>(PyObject_GetAttr(like, torch.dtype))
                                    : py::reinterpret_borrow<py::object>(dtype);
  if (!own) return nullptr;
  if (PyObject* const large = large_empty(sizes, own)) return large;
  PyObject* given[] = {sizes.ptr(), strides.ptr(), own.ptr()};
  return PyObject_Vectorcall(torch.empty_strided, given, 3, nullptr);
}

PyObject* empty(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 3) return PyErr_Format(PyExc_TypeError, "empty: expected (like, shape, dtype)");
  return guarded([&]() -> PyObject* {
    dlpack::Tensor view;
    return empty_of(args[0], args[1], args[2], simple(args[0], &view) ? &view : nullptr);
  });
}

PyObject* empties(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n % 2 != 1) return PyErr_Format(PyExc_TypeError, "empties: expected (like, shape, dtype, shape, dtype, ...)");
  return guarded([&]() -> PyObject* {
    dlpack::Tensor view;
    const dlpack::Tensor* known = simple(args[0], &view) ? &view : nullptr;
    py::tuple made{size_t(n / 2)};
    for (Py_ssize_t i = 1; i < n; i += 2) {
      PyObject* one = args[i] == Py_None ? Py_NewRef(Py_None) : empty_of(args[0], args[i], args[i + 1], known);
      if (!one) return nullptr;
      PyTuple_SET_ITEM(made.ptr(), i / 2, one);
    }
    return made.release().ptr();
  });
}

PyObject* empty_gradients(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 3 || !PyTuple_Check(args[1]))
    return PyErr_Format(PyExc_TypeError, "empty_gradients: expected (inputs, places, needs)");
  return guarded([&]() -> PyObject* {
    const auto inputs = py::reinterpret_steal<py::object>(PySequence_Fast(args[0], "inputs")),
               needs = py::reinterpret_steal<py::object>(PySequence_Fast(args[2], "needs"));
    if (!inputs || !needs) return nullptr;
    const Py_ssize_t count = std::min(PyTuple_GET_SIZE(args[1]), PySequence_Fast_GET_SIZE(needs.ptr()));
    const bool deterministic = truth(PyObject_CallNoArgs(torch.deterministic));
    py::list gradients{size_t(count)};
    for (Py_ssize_t i = 0; i < count; i++) {
      const int need = PyObject_IsTrue(PySequence_Fast_GET_ITEM(needs.ptr(), i));
      const Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(args[1], i));
      if (need < 0 || PyErr_Occurred()) return nullptr;
      if (place < 0 || place >= PySequence_Fast_GET_SIZE(inputs.ptr()))
        return PyErr_Format(PyExc_IndexError, "empty_gradients: no input %zd", place);
      PyObject* like = PySequence_Fast_GET_ITEM(inputs.ptr(), place);
      dlpack::Tensor view;
      const bool known = need && !deterministic && view_of(like, &view) && view.device.type == dlpack::kCPU;
      PyObject* gradient = need ? empty_of(like, Py_None, Py_None, known ? &view : nullptr) : Py_NewRef(Py_None);
      if (!gradient) return nullptr;
      PyList_SET_ITEM(gradients.ptr(), i, gradient);
    }
    return gradients.release().ptr();
  });
}

template <class Function>
PyMethodDef fast(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

void bind_calls(py::module_& m) {
  m.def("bind_torch", &bind_torch, py::arg("tensor"), py::arg("parameter"), py::arg("watchers"), py::arg("forward_ad"),
        py::arg("grad_enabled"), py::arg("deterministic"), py::arg("empty_strided"), py::arg("general_empty"));
  static PyMethodDef functions[] = {fast("call_kind", &call_kind),
                                    fast("tensor_key", &tensor_key),
                                    fast("empty", &empty),
                                    fast("empties", &empties),
                                    fast("empty_gradients", &empty_gradients),
                                    fast("integers_fit", &integers_fit),
                                    {}};
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace mk
