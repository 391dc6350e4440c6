// The one pybind11 file of the CPU extension. A new op: declare bind_<op> and call it, once each, in the list below.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>

#include "common/cpu_features.h"
#include "common/parallel.h"
#include "common/tensor_view.h"

namespace py = pybind11;

#define MK_OPS(OP) \
  OP(attention)    \
  OP(content)      \
  OP(lstm_gates)   \
  OP(memory_read)  \
  OP(memory_write) \
  OP(recurrent)    \
  OP(vec_math)

namespace mk::cpu {
#define MK_DECLARE(name) void bind_##name(py::module_& m);
MK_OPS(MK_DECLARE)
#undef MK_DECLARE
}  // namespace mk::cpu

namespace {

std::vector<std::string> names(const std::vector<mk::Level>& levels) {
  std::vector<std::string> out;
  for (mk::Level level : levels) out.push_back(mk::level_name(level));
  return out;
}

void bind(const py::capsule& exchange, uintptr_t parallel_for, uintptr_t num_threads) {
  mk::dlpack::bind_exchange(exchange);
  mk::threads() = {reinterpret_cast<mk::TorchParallelFor>(parallel_for),
                   reinterpret_cast<mk::TorchNumThreads>(num_threads), getpid()};
}

// The tensors, those copied whose last dimension is not a contiguous run of memory; None stays None. Here rather than
// in Python, where asking for sizes and strides costs more than a small kernel.
py::object inner_contiguous(const py::args& tensors) {
  py::object result = tensors;
  for (size_t i = 0; i < tensors.size(); i++) {
    const auto view = tensors[i].cast<mk::TensorView>();
    if (!view.defined() || view.ndim() == 0) continue;
    const int last = view.ndim() - 1;
    if (view.size(last) <= 1 || view.stride(last) == 1) continue;
    if (result.is(tensors)) result = py::tuple(py::list(tensors));
    PyTuple_SetItem(result.ptr(), Py_ssize_t(i), py::object(tensors[i].attr("contiguous")()).release().ptr());
  }
  return result;
}

// The exact classes of plain tensors; they live as long as the process.
PyTypeObject* tensor_classes[2] = {};

void bind_tensor_classes(const py::type& tensor, const py::type& parameter) {
  tensor_classes[0] = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  tensor_classes[1] = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

// Sizes, dtype and device of plain tensors as bytes: what the checks of a call depend on. None if one is not plain.
py::object tensor_key(const py::args& tensors) {
  int64_t words[256];
  size_t n = 0;
  for (const py::handle t : tensors) {
    if (n + 2 > std::size(words)) return py::none();
    if (t.is_none()) {
      words[n++] = -1;
      continue;
    }
    mk::dlpack::Tensor view;
    if (Py_TYPE(t.ptr()) != tensor_classes[0] && Py_TYPE(t.ptr()) != tensor_classes[1]) return py::none();
    if (mk::dlpack::exchange()->view(t.ptr(), &view) != 0) {
      PyErr_Clear();
      return py::none();
    }
    if (n + 2 + size_t(view.ndim) > std::size(words)) return py::none();
    words[n++] = int64_t(view.ndim) << 32 | int64_t(view.dtype.code) << 24 | view.dtype.bits << 16 | view.dtype.lanes;
    words[n++] = int64_t(view.device.type) << 32 | uint32_t(view.device.id);
    n = size_t(std::copy_n(view.shape, view.ndim, words + n) - words);
  }
  return py::bytes(reinterpret_cast<const char*>(words), n * sizeof(int64_t));
}

// For the tests of parallel.h: how often each item was visited, and the ranks a team of `size` really ran with.
std::vector<int64_t> parallel_visits(int64_t n, int64_t grain) {
  std::vector<int64_t> visits(n, 0);
  mk::parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) visits[i]++;
  });
  return visits;
}
int64_t team_rounds(int size, int64_t rounds) {
  std::atomic<int64_t> sum{0};
  mk::team(size, [&](int rank, int members, mk::Barrier& barrier) {
    for (int64_t i = 0; i < rounds; i++) {
      if (i % members == rank) sum.fetch_add(1);
      barrier.wait();
      if (sum.load() < i + 1) throw std::runtime_error("barrier let a rank run ahead");
    }
  });
  return sum.load();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of memkernels; arguments are torch tensors, outputs are allocated by the caller.";
  m.def("bind", &bind, py::arg("exchange_api"), py::arg("parallel_for"), py::arg("num_threads"),
        "Hands over torch's DLPack exchange API and the addresses of its parallel shims; once, before any op.");
  m.def("bind_tensor_classes", &bind_tensor_classes);
  m.def("tensor_key", &tensor_key);
  m.def("inner_contiguous", &inner_contiguous);
  m.def("cpu_level", [] { return std::string(mk::level_name(mk::cpu_level())); });
  m.def("set_cpu_level", &mk::set_cpu_level, py::arg("level"));
  m.def("built_levels", [] { return names(mk::built_levels()); });
  m.def("supported_levels", [] { return names(mk::supported_levels()); });
  m.def("num_threads", &mk::num_threads);
  m.def("parallel_visits", &parallel_visits, py::call_guard<py::gil_scoped_release>());
  m.def("team_rounds", &team_rounds, py::call_guard<py::gil_scoped_release>());
#define MK_BIND(name) mk::cpu::bind_##name(m);
  MK_OPS(MK_BIND)
#undef MK_BIND
}
