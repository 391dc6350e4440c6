// lstm_gates, host side: checks, the split into tasks, the Python binding.
#include "cpu/lstm_gates.h"

#include <algorithm>

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "lstm_gates";
constexpr int64_t kColumns = 64;  // of a backward task: whole cache lines in every element type

LstmGatesArgs arguments(const TensorView& gates, const TensorView& cell, const TensorView& peephole) {
  check_rank(kOp, "cell", cell, 2);
  check_float(kOp, "cell", cell);
  check_inner(kOp, "cell", cell);
  LstmGatesArgs a{};
  a.batch = cell.size(0), a.hidden = cell.size(1);
  check_tensor(kOp, "gates", gates, {a.batch, 4 * a.hidden}, cell.dtype());
  check_inner(kOp, "gates", gates);
  a.gates = gates.data(), a.gates_b = gates.stride(0);
  a.cell = cell.data(), a.cell_b = cell.stride(0);
  if (peephole.defined()) {
    check_tensor(kOp, "peephole", peephole, {3, a.hidden}, cell.dtype());
    check_inner(kOp, "peephole", peephole);
    a.peephole = peephole.data(), a.peephole_r = peephole.stride(0);
  }
  return a;
}

void forward(const TensorView& h, const TensorView& c, const InputView& gates, const InputView& cell,
             const InputView& peephole) {
  LstmGatesArgs a = arguments(gates, cell, peephole);
  check_output(kOp, "h", h, {a.batch, a.hidden}, cell.dtype());
  check_output(kOp, "c", c, {a.batch, a.hidden}, cell.dtype());
  a.h = h.data(), a.c = c.data();
  const int dtype = int(cell.dtype());
  const auto& kernels = select(lstm_gates_levels);
  pybind11::gil_scoped_release nogil;
  parallel_for(a.batch, grain_for(7 * a.hidden * item_size(cell.dtype())),
               [&](int64_t begin, int64_t end) { kernels.forward[dtype](a, begin, end); });
}

void take_upstream(const char* name, const TensorView& from, const LstmGatesArgs& a, DType dtype, const void*& data,
                   int64_t& stride) {
  if (!from.defined()) return;
  check_tensor(kOp, name, from, {a.batch, a.hidden}, dtype);
  check_inner(kOp, name, from);
  data = from.data(), stride = from.stride(0);
}

void backward(const TensorView& dgates, const TensorView& dcell, const TensorView& dpeephole, const InputView& dh,
              const InputView& dc, const InputView& gates, const InputView& cell, const InputView& peephole) {
  LstmGatesArgs a = arguments(gates, cell, peephole);
  take_upstream("dh", dh, a, cell.dtype(), a.dh, a.dh_b);
  take_upstream("dc", dc, a, cell.dtype(), a.dc, a.dc_b);
  if (dgates.defined()) check_output(kOp, "dgates", dgates, {a.batch, 4 * a.hidden}, cell.dtype());
  if (dcell.defined()) check_output(kOp, "dcell", dcell, {a.batch, a.hidden}, cell.dtype());
  if (dpeephole.defined()) check_output(kOp, "dpeephole", dpeephole, {3, a.hidden}, cell.dtype());
  a.dgates = dgates.defined() ? dgates.data() : nullptr;
  a.dcell = dcell.defined() ? dcell.data() : nullptr;
  a.dpeephole = dpeephole.defined() && peephole.defined() ? dpeephole.data() : nullptr;
  const int dtype = int(cell.dtype());
  const auto& kernels = select(lstm_gates_levels);
  pybind11::gil_scoped_release nogil;
  const int64_t bytes = 12 * item_size(cell.dtype());
  if (!a.dpeephole) {
    parallel_for(a.batch, grain_for(a.hidden * bytes),
                 [&](int64_t begin, int64_t end) { kernels.backward[dtype](a, begin, end, 0, a.hidden); });
    return;
  }
  const int64_t blocks = (a.hidden + kColumns - 1) / kColumns;
  parallel_for(blocks, grain_for(a.batch * kColumns * bytes), [&](int64_t begin, int64_t end) {
    kernels.backward[dtype](a, 0, a.batch, begin * kColumns, std::min(end * kColumns, a.hidden));
  });
}

}  // namespace

void bind_lstm_gates(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("lstm_gates", &forward, py::arg("h"), py::arg("c"), py::arg("gates"), py::arg("cell"), py::arg("peephole"));
  m.def("lstm_gates_backward", &backward, py::arg("dgates"), py::arg("dcell"), py::arg("dpeephole"), py::arg("dh"),
        py::arg("dc"), py::arg("gates"), py::arg("cell"), py::arg("peephole"));
}

}  // namespace mk::cpu
