// The recurrent family, host side: checks and the Python binding.
#include "common/pages.h"
#include "cpu/recurrent_host.h"

namespace mk::cpu {
namespace {

using In = RecurrentInputs;
using Options = RecurrentOptions;

void* data_or_null(const TensorView& t) { return t.defined() ? t.data() : nullptr; }

void check_matrix(const char* op, const char* name, const TensorView& t, std::initializer_list<int64_t> sizes,
                  DType type) {
  check_tensor(op, name, t, sizes, type);
  check_inner(op, name, t);
}

GivenState given_state(const char* op, const char* names[2], const TensorView& initial, const TensorView& reset,
                       const RecurrentRows& rows, int64_t H, DType type) {
  check_matrix(op, names[0], initial, {rows.B, H}, type);
  GivenState out{initial.data(), nullptr, initial.stride(0), 0, 0};
  if (!reset.defined()) return out;
  check_matrix(op, names[1], reset, {rows.T, rows.B, H}, type);
  out.reset = reset.data(), out.reset_t = reset.stride(0), out.reset_b = reset.stride(1);
  return out;
}

void take_reset(RecurrentRows& rows, const char* op, const TensorView& reset) {
  if (!reset.defined()) return;
  check_tensor(op, "reset", reset, {rows.T, rows.B}, DType::boolean);
  rows.reset = reset.data<uint8_t>(), rows.reset_t = reset.stride(0), rows.reset_b = reset.stride(1);
}

// What forward and backward share; `state` is what a cell carries.
template <class Call>
Call arguments(const In& in, const Options& options, GivenState Call::*state) {
  const char* op = options.op;
  check_rank(op, "input", in.input, 3);
  check_float(op, "input", in.input);
  check_inner(op, "input", in.input);
  check_rank(op, "weight_hh", in.weight_hh, 2);
  Call f{};
  f.cell = options.cell, f.relu = options.relu;
  const CellShape& shape = kShapes[int(f.cell)];
  const DType type = in.input.dtype();
  f.rows.T = in.input.size(0), f.rows.B = in.input.size(1), f.I = in.input.size(2), f.H = in.weight_hh.size(1);
  check_matrix(op, "weight_hh", in.weight_hh, {shape.gates * f.H, f.H}, type);
  check_matrix(op, "weight_ih", in.weight_ih, {shape.gates * f.H, f.I}, type);
  if (in.bias_ih.defined()) check_matrix(op, "bias_ih", in.bias_ih, {shape.gates * f.H}, type);
  if (in.bias_hh.defined()) check_matrix(op, "bias_hh", in.bias_hh, {shape.gates * f.H}, type);
  take_reset(f.rows, op, in.reset);
  const char *hidden[2] = {"h0", "reset_h"}, *cell[2] = {"c0", "reset_c"};
  f.hidden0 = given_state(op, hidden, in.h0, in.reset_h, f.rows, f.H, type);
  f.*state = shape.cell_state ? given_state(op, cell, in.c0, in.reset_c, f.rows, f.H, type) : f.hidden0;
  f.input = in.input.data(), f.input_t = in.input.stride(0), f.input_b = in.input.stride(1);
  f.weight_ih = in.weight_ih.data(), f.weight_ih_n = in.weight_ih.stride(0);
  f.weight_hh = in.weight_hh.data(), f.weight_hh_n = in.weight_hh.stride(0);
  return f;
}

void* take_output(const char* op, const char* name, const TensorView& t, std::initializer_list<int64_t> sizes,
                  DType type) {
  if (!t.defined()) return nullptr;
  check_output(op, name, t, sizes, type);
  prefer_huge_pages(t.data(), t.numel() * item_size(type));
  return t.data();
}

void forward(const Options& options, const RecurrentOutputs& out, const In& in) {
  auto f = arguments<RecurrentForward>(in, options, &RecurrentForward::carry0);
  const char* op = options.op;
  const DType type = in.input.dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  const Lengths lengths = lengths_of(op, in.lengths, T, B);
  check_output(op, "output", out.output, {T, B, f.H}, type);
  check_output(op, "h_n", out.h_n, {B, f.H}, type);
  f.output = take_output(op, "output", out.output, {T, B, f.H}, type);
  f.h_n = take_output(op, "h_n", out.h_n, {B, f.H}, type), f.c_n = take_output(op, "c_n", out.c_n, {B, f.H}, type);
  f.cells = take_output(op, "cells", out.cells, {T, B, f.H}, type);
  f.gates = take_output(op, "gates", out.gates, {T, B, kShapes[int(f.cell)].saved * f.H}, type);
  f.bias_ih = data_or_null(in.bias_ih), f.bias_hh = data_or_null(in.bias_hh);
  pybind11::gil_scoped_release nogil;
  run_recurrent(f, lengths, options.reverse, type);
}

// Cells and gates of a call whose output is known.
void recall(const Options& options, const RecurrentOutputs& saved, const In& in) {
  auto f = arguments<RecurrentForward>(in, options, &RecurrentForward::carry0);
  const char* op = options.op;
  const DType type = in.input.dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  const Lengths lengths = lengths_of(op, in.lengths, T, B);
  check_output(op, "output", saved.output, {T, B, f.H}, type);
  f.known_output = saved.output.data();
  f.cells = take_output(op, "cells", saved.cells, {T, B, f.H}, type);
  f.gates = take_output(op, "gates", saved.gates, {T, B, kShapes[int(f.cell)].saved * f.H}, type);
  f.bias_ih = data_or_null(in.bias_ih), f.bias_hh = data_or_null(in.bias_hh);
  pybind11::gil_scoped_release nogil;
  if (T > 0) run_recurrent(f, lengths, options.reverse, type);
}

void take_upstream(RecurrentBackward& f, const char* op, const RecurrentUpstream& from, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B;
  auto take = [&](const char* name, const TensorView& t, bool steps, const void*& data, int64_t* stride_t,
                  int64_t& stride_b) {
    if (!t.defined()) return;
    if (steps)
      check_matrix(op, name, t, {T, B, f.H}, type), *stride_t = t.stride(0);
    else
      check_matrix(op, name, t, {B, f.H}, type);
    data = t.data(), stride_b = t.stride(steps ? 1 : 0);
  };
  take("doutput", from.doutput, true, f.doutput, &f.doutput_t, f.doutput_b);
  take("dcells", from.dcells, true, f.dcells, &f.dcells_t, f.dcells_b);
  take("dh_n", from.dh_n, false, f.dh_n, nullptr, f.dh_n_b);
  take("dc_n", from.dc_n, false, f.dc_n, nullptr, f.dc_n_b);
}

void take_gradients(RecurrentBackward& f, const char* op, const RecurrentGradients& to, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B, gates = f.gate_rows();
  f.dinput = take_output(op, "dinput", to.dinput, {T, B, f.I}, type);
  f.dh0 = take_output(op, "dh0", to.dh0, {B, f.H}, type), f.dc0 = take_output(op, "dc0", to.dc0, {B, f.H}, type);
  f.dweight_ih = take_output(op, "dweight_ih", to.dweight_ih, {gates, f.I}, type);
  f.dweight_hh = take_output(op, "dweight_hh", to.dweight_hh, {gates, f.H}, type);
  f.dbias_ih = take_output(op, "dbias_ih", to.dbias_ih, {gates}, type);
  f.dbias_hh = take_output(op, "dbias_hh", to.dbias_hh, {gates}, type);
  f.dreset_h = take_output(op, "dreset_h", to.dreset_h, {T, B, f.H}, type);
  f.dreset_c = take_output(op, "dreset_c", to.dreset_c, {T, B, f.H}, type);
}

void backward(const Options& options, const RecurrentGradients& to, const RecurrentUpstream& from, const In& in,
              const RecurrentOutputs& saved) {
  auto f = arguments<RecurrentBackward>(in, options, &RecurrentBackward::state0);
  const char* op = options.op;
  const CellShape& shape = f.shape();
  const DType type = in.input.dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  const Lengths lengths = lengths_of(op, in.lengths, T, B);
  check_output(op, "output", saved.output, {T, B, f.H}, type);
  if (shape.cell_state) check_output(op, "cells", saved.cells, {T, B, f.H}, type);
  if (shape.saved) check_output(op, "gates", saved.gates, {T, B, shape.saved * f.H}, type);
  f.output = saved.output.data(), f.gates = shape.saved ? saved.gates.data() : nullptr;
  f.states = shape.cell_state ? saved.cells.data() : f.output;
  take_upstream(f, op, from, type);
  take_gradients(f, op, to, type);
  pybind11::gil_scoped_release nogil;
  run_recurrent(f, lengths, options.reverse, type);
}

// The arguments of a call in their order.
class Reader {
 public:
  Reader(const pybind11::args& arguments, Cell cell) : arguments_(arguments), cell_(cell) {}
  RecurrentOutputs outputs() {
    return {tensor(), tensor(), tensor(has_cells()), tensor(has_cells()), tensor(has_gates())};
  }
  RecurrentOutputs saved() { return {tensor(), {}, {}, tensor(has_cells()), tensor(has_gates())}; }
  In inputs() {
    return {input(),  input(), input(has_cells()), input(), input(), input(), input(),
            tensor(), input(), input(has_cells()), tensor()};
  }
  RecurrentUpstream upstream() { return {input(), input(), input(has_cells()), input(has_cells())}; }
  RecurrentGradients gradients() {
    return {tensor(), tensor(), tensor(has_cells()), tensor(), tensor(), tensor(),
            tensor(), tensor(), tensor(has_cells())};
  }
  Options options(const char* op) {
    const bool relu = cell_ == Cell::rnn && flag();
    return {op, cell_, relu, flag()};
  }

 private:
  bool has_cells() const { return cell_ == Cell::lstm; }
  bool has_gates() const { return cell_ != Cell::rnn; }
  TensorView tensor(bool there = true) { return there ? arguments_[next_++].cast<TensorView>() : TensorView(); }
  InputView input(bool there = true) { return there ? arguments_[next_++].cast<InputView>() : InputView(); }
  bool flag() { return arguments_[next_++].cast<bool>(); }

  const pybind11::args& arguments_;
  const Cell cell_;
  size_t next_ = 0;
};

template <Cell kCell>
void bind_cell(pybind11::module_& m, const char* op, const char* op_backward) {
  // outputs, inputs, options
  m.def(op, [op](const pybind11::args& arguments) {
    Reader read(arguments, kCell);
    const RecurrentOutputs out = read.outputs();
    const In in = read.inputs();
    forward(read.options(op), out, in);
  });
  // d<inputs>, d<outputs>, inputs, saved outputs, options: the order of a backend's backward.
  m.def(op_backward, [op](const pybind11::args& arguments) {
    Reader read(arguments, kCell);
    const RecurrentGradients to = read.gradients();
    const RecurrentUpstream from = read.upstream();
    const In in = read.inputs();
    const RecurrentOutputs saved = read.saved();
    backward(read.options(op), to, from, in, saved);
  });
}

// saved outputs, inputs, options
template <Cell kCell>
void bind_recall(pybind11::module_& m, const char* op, const char* op_recall) {
  m.def(op_recall, [op](const pybind11::args& arguments) {
    Reader read(arguments, kCell);
    const RecurrentOutputs saved = read.saved();
    const In in = read.inputs();
    recall(read.options(op), saved, in);
  });
}

}  // namespace

void bind_recurrent(pybind11::module_& m) {
  bind_cell<Cell::lstm>(m, "lstm", "lstm_backward");
  bind_cell<Cell::gru>(m, "gru", "gru_backward");
  bind_cell<Cell::rnn>(m, "rnn", "rnn_backward");
  bind_recall<Cell::lstm>(m, "lstm", "lstm_recall");
  bind_recall<Cell::gru>(m, "gru", "gru_recall");
}

}  // namespace mk::cpu
