// gru_gates, host side: checks, the split into tasks, the Python binding.
#include "cpu/gru_gates.h"

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "gru_gates";

void take(const char* name, const TensorView& from, std::initializer_list<int64_t> sizes, DType dtype,
          const void*& data, int64_t& stride) {
  check_tensor(kOp, name, from, sizes, dtype);
  check_inner(kOp, name, from);
  data = from.data(), stride = from.stride(0);
}

GruGatesArgs arguments(const TensorView& gates_input, const TensorView& gates_hidden, const TensorView& state) {
  check_rank(kOp, "hidden", state, 2);
  check_float(kOp, "hidden", state);
  GruGatesArgs a{};
  const DType dtype = state.dtype();
  a.batch = state.size(0), a.hidden = state.size(1);
  take("gates_input", gates_input, {a.batch, 3 * a.hidden}, dtype, a.gates_input, a.gates_input_b);
  take("gates_hidden", gates_hidden, {a.batch, 3 * a.hidden}, dtype, a.gates_hidden, a.gates_hidden_b);
  take("hidden", state, {a.batch, a.hidden}, dtype, a.state, a.state_b);
  return a;
}

void forward(const TensorView& h, const InputView& gates_input, const InputView& gates_hidden,
             const InputView& hidden) {
  GruGatesArgs a = arguments(gates_input, gates_hidden, hidden);
  const DType type = hidden.dtype();
  check_output(kOp, "h", h, {a.batch, a.hidden}, type);
  a.h = h.data();
  const auto& kernels = select(gru_gates_levels);
  pybind11::gil_scoped_release nogil;
  parallel_for(a.batch, grain_for(8 * a.hidden * item_size(type)),
               [&](int64_t begin, int64_t end) { kernels.forward[int(type)](a, begin, end); });
}

void backward(const TensorView& dgates_input, const TensorView& dgates_hidden, const TensorView& dhidden,
              const InputView& dh, const InputView& gates_input, const InputView& gates_hidden,
              const InputView& hidden) {
  GruGatesArgs a = arguments(gates_input, gates_hidden, hidden);
  const DType type = hidden.dtype();
  take("dh", dh, {a.batch, a.hidden}, type, a.dh, a.dh_b);
  const auto wanted = [&](const char* name, const TensorView& t, int64_t width) -> void* {
    if (!t.defined()) return nullptr;
    check_output(kOp, name, t, {a.batch, width}, type);
    return t.data();
  };
  a.dgates_input = wanted("dgates_input", dgates_input, 3 * a.hidden);
  a.dgates_hidden = wanted("dgates_hidden", dgates_hidden, 3 * a.hidden);
  a.dstate = wanted("dhidden", dhidden, a.hidden);
  const auto& kernels = select(gru_gates_levels);
  pybind11::gil_scoped_release nogil;
  parallel_for(a.batch, grain_for(15 * a.hidden * item_size(type)),
               [&](int64_t begin, int64_t end) { kernels.backward[int(type)](a, begin, end); });
}

}  // namespace

void bind_gru_gates(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("gru_gates", &forward, py::arg("h"), py::arg("gates_input"), py::arg("gates_hidden"), py::arg("hidden"));
  m.def("gru_gates_backward", &backward, py::arg("dgates_input"), py::arg("dgates_hidden"), py::arg("dhidden"),
        py::arg("dh"), py::arg("gates_input"), py::arg("gates_hidden"), py::arg("hidden"));
}

}  // namespace mk::cpu
