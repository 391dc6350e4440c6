// lstm with options, host side: checks, scratch, the loop over chunks, steps and phases that a team runs, the binding.
#include "cpu/lstm_options_host.h"

#include "common/pages.h"

namespace mk::cpu {
namespace {

SteppedRows rows_of(const LstmInputs& in, int64_t T, int64_t B, bool reverse) {
  SteppedRows rows{T, B, reverse, nullptr, 0, 0, nullptr, 0};
  const TensorView &reset = in[kReset], &lengths = in[kLengths];
  if (reset.defined()) {
    check_tensor(kLstm, "reset", reset, {T, B}, DType::boolean);
    rows.reset = reset.data<uint8_t>(), rows.reset_t = reset.stride(0), rows.reset_b = reset.stride(1);
  }
  if (!lengths.defined()) return rows;
  check_tensor(kLstm, "lengths", lengths, {B}, DType::int64);
  rows.lengths = lengths.data<int64_t>(), rows.lengths_b = lengths.stride(0);
  for (int64_t b = 0; b < B; b++)
    MK_CHECK(rows.length(b) >= 0 && rows.length(b) <= T, kLstm, "lengths", "values in 0..T=" + std::to_string(T),
             rows.length(b));
  return rows;
}

void take_states(LstmOptions& f, const LstmInputs& in, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B;
  check_rows("h0", in[kH0], {B, f.P}, type), check_rows("c0", in[kC0], {B, f.H}, type);
  f.h0 = in[kH0].data(), f.h0_b = in[kH0].stride(0), f.c0 = in[kC0].data(), f.c0_b = in[kC0].stride(0);
  if (in[kResetH].defined()) {
    check_rows("reset_h", in[kResetH], {T, B, f.P}, type);
    f.reset_h = in[kResetH].data(), f.reset_h_t = in[kResetH].stride(0), f.reset_h_b = in[kResetH].stride(1);
  }
  if (!in[kResetC].defined()) return;
  check_rows("reset_c", in[kResetC], {T, B, f.H}, type);
  f.reset_c = in[kResetC].data(), f.reset_c_t = in[kResetC].stride(0), f.reset_c_b = in[kResetC].stride(1);
}

// A row of the result is the weight times a row of the operand.
Product product_with(const char* name, const TensorView& weight, int64_t rows, int64_t columns, DType type) {
  if (!weight.defined()) return {};
  check_rows(name, weight, {rows, columns}, type);
  return {1, rows, 1, columns, 0, 0, 1, true, weight.data(), weight.stride(0), 1, 0, 0, nullptr};
}

void take_weights(LstmOptions& f, const LstmInputs& in, DType type) {
  f.input_to_gates = product_with("weight_ih", in[kWeightIh], 4 * f.H, f.I, type);
  f.hidden_to_gates = product_with("weight_hh", in[kWeightHh], 4 * f.H, f.P / f.heads, type);
  f.cell_to_output = product_with("weight_co", in[kWeightCo], f.H, f.H, type);
  f.project = product_with("weight_hr", in[kWeightHr], f.P, f.H, type);
  f.input_to_gates.width = f.input_gates();
  if (f.heads > 1) {
    Product& p = f.hidden_to_gates;
    p.segments = 4 * f.heads, p.width = f.H / f.heads, p.segment_step = p.depth, p.period = f.heads;
    p.segment_stride = p.width * p.column_stride;
  }
  if (in[kBiasIh].defined()) check_rows("bias_ih", in[kBiasIh], {4 * f.H}, type), f.bias_ih = in[kBiasIh].data();
  if (in[kBiasHh].defined()) check_rows("bias_hh", in[kBiasHh], {4 * f.H}, type), f.bias_hh = in[kBiasHh].data();
  if (in[kPeephole].defined()) {
    check_rows("peephole", in[kPeephole], {3, f.H}, type);
    f.peephole = &f, f.raw_peephole = in[kPeephole].data(), f.raw_peephole_p = in[kPeephole].stride(0);
  }
  if (!in[kNormWeight].defined()) return;
  check_rows("norm_weight", in[kNormWeight], {9 * f.H}, type), check_rows("norm_bias", in[kNormBias], {9 * f.H}, type);
  f.gamma = &f, f.raw_gamma = in[kNormWeight].data(), f.raw_beta = in[kNormBias].data();
}

void* scratch_rows(Scratch& scratch, int64_t rows, int64_t ld, int dtype) {
  return scratch.take<char>(rows * ld * sum_bytes(dtype));
}

void plan_forward(LstmOptionsForward& f, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch) {
  plan_options(f, kernels, dtype, scratch);
  const int64_t B = f.rows.B;
  f.x = scratch_rows(scratch, f.chunk, f.ld_x, dtype), f.projected = scratch_rows(scratch, f.chunk, f.ld_z, dtype);
  f.z = scratch_rows(scratch, f.known_output ? f.chunk : B, f.ld_z, dtype);
  f.carry = scratch_rows(scratch, B, f.ld_h, dtype), f.c_new = scratch_rows(scratch, B, f.ld_h, dtype);
  if (f.cell_gate()) f.from_cell = scratch_rows(scratch, B, f.ld_h, dtype);
  if (f.known_output) {
    f.operand = scratch_rows(scratch, f.chunk, f.ld_p, dtype);
    return;
  }
  f.hidden = f.operand = scratch_rows(scratch, B, f.ld_p, dtype);
  if (f.mask) f.operand = scratch_rows(scratch, B, f.ld_p, dtype);
  f.q = scratch_rows(scratch, B, f.ld_h, dtype);
  if (f.projects()) f.h_new = scratch_rows(scratch, B, f.ld_p, dtype);
}

void run_step(const LstmOptionsForward& f, const LstmTeam& team, int64_t t, int64_t row) {
  const auto& k = team.kernels;
  const int64_t B = f.rows.B;
  const Span rows = team.share(B);
  if (!f.known_output) {
    team.multiply(f.hidden_to_gates, f.operand, f.ld_p, B, f.z, f.ld_z);
    team.wait();
  }
  k.gates[team.dtype](f, t, row, rows);
  if (f.cell_gate()) {
    team.wait();
    team.multiply(f.cell_to_output, f.c_new, f.ld_h, B, f.from_cell, f.ld_h);
    team.wait();
  }
  k.outputs[team.dtype](f, t, row, rows);
  if (f.projects() && !f.known_output) {
    team.wait();
    team.multiply(f.project, f.q, f.ld_h, B, f.h_new, f.ld_p);
    team.wait();
  }
  k.states[team.dtype](f, t, rows);
  if (!f.known_output) team.wait();
}

void run_forward(const LstmOptionsForward& f, const LstmTeam& team) {
  const auto& k = team.kernels;
  const int64_t B = f.rows.B, steps = f.chunk / B;
  team.prepare(f);
  k.start[team.dtype](f, team.share(B));
  for (int64_t i = 0; i * steps < f.rows.T; i++) {
    const Span chunk = steps_of(f.rows, steps, i, f.rows.reverse);
    const int64_t length = chunk.end - chunk.begin, count = length * B;
    k.gather_input[team.dtype](f, f.x, chunk, team.share(count));
    if (f.known_output) k.gather_hidden[team.dtype](f, f.known_output, f.operand, chunk, team.share(count));
    team.wait();
    team.multiply(f.input_to_gates, f.x, f.ld_x, count, f.projected, f.ld_z);
    if (f.known_output) team.multiply(f.hidden_to_gates, f.operand, f.ld_p, count, f.z, f.ld_z);
    team.wait();
    k.finish_input[team.dtype](f, f.projected, team.share(count));
    team.wait();
    for (int64_t s = 0; s < length; s++) {
      const int64_t at = f.rows.reverse ? length - 1 - s : s;
      run_step(f, team, chunk.begin + at, at * B);
    }
  }
}

void run(LstmOptionsForward& f, DType type) {
  const int dtype = int(type);
  const auto& kernels = select(lstm_options_levels);
  pybind11::gil_scoped_release nogil;
  if (f.rows.B == 0) return;
  Scratch scratch;
  // The input part of z for a chunk should stay in the L2 cache. No result depends on where chunks end.
  const int64_t bytes = std::max<int64_t>(4 * f.H * sum_bytes(dtype), 1);
  const int64_t rows = std::clamp<int64_t>((int64_t(1) << 20) / bytes, 64, 512);
  f.chunk = std::clamp<int64_t>(rows / f.rows.B, 1, std::max<int64_t>(f.rows.T, 1)) * f.rows.B;
  plan_forward(f, kernels, dtype, scratch);
  team(ranks_of(f), [&](int rank, int size, Barrier& barrier) {
    run_forward(f, {kernels, dtype, rank, size, barrier});
  });
}

void forward(const std::vector<TensorView>& out, const LstmInputs& in, const LstmNumbers& numbers) {
  LstmOptionsForward f{};
  take_inputs(f, in, numbers);
  const DType type = in[kInput].dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  const TensorView &output = out[0], &h_n = out[1], &c_n = out[2], &cells = out[3], &gates = out[4];
  check_output(kLstm, "output", output, {T, B, f.P}, type);
  check_output(kLstm, "h_n", h_n, {B, f.P}, type);
  check_output(kLstm, "c_n", c_n, {B, f.H}, type);
  if (cells.defined()) check_output(kLstm, "cells", cells, {T, B, f.H}, type);
  if (gates.defined()) check_output(kLstm, "gates", gates, {T, B, 4 * f.H}, type);
  for (const TensorView* saved : {&output, &cells, &gates})
    if (saved->defined()) prefer_huge_pages(saved->data(), saved->numel() * item_size(type));
  f.output = output.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.cells = data_of(cells), f.gates = data_of(gates);
  run(f, type);
}

// Cells and gates of a call whose output is known: products over all steps at once, then a scan of the cells.
void recall(const TensorView& cells, const TensorView& gates, const TensorView& output, const LstmInputs& in,
            const LstmNumbers& numbers) {
  LstmOptionsForward f{};
  take_inputs(f, in, numbers);
  const DType type = in[kInput].dtype();
  check_output(kLstm, "cells", cells, {f.rows.T, f.rows.B, f.H}, type);
  check_output(kLstm, "gates", gates, {f.rows.T, f.rows.B, 4 * f.H}, type);
  check_output(kLstm, "output", output, {f.rows.T, f.rows.B, f.P}, type);
  f.cells = cells.data(), f.gates = gates.data(), f.known_output = output.data();
  if (f.rows.T * f.H > 0) run(f, type);
}

}  // namespace

void take_inputs(LstmOptions& f, const LstmInputs& in, const LstmNumbers& numbers) {
  MK_CHECK(in.size() == kLstmInputs, kLstm, "inputs", "17 tensors", in.size());
  const TensorView& input = in[kInput];
  check_rank(kLstm, "input", input, 3);
  check_float(kLstm, "input", input);
  check_inner(kLstm, "input", input);
  check_rank(kLstm, "h0", in[kH0], 2);
  check_rank(kLstm, "c0", in[kC0], 2);
  const DType type = input.dtype();
  f.rows = rows_of(in, input.size(0), input.size(1), numbers.reverse);
  f.I = input.size(2), f.H = in[kC0].size(1), f.P = in[kH0].size(1), f.heads = numbers.heads;
  MK_CHECK(f.heads >= 1 && f.H % f.heads == 0 && f.P % f.heads == 0, kLstm, "num_heads", "a divisor of P and H",
           f.heads);
  f.input = input.data(), f.input_t = input.stride(0), f.input_b = input.stride(1);
  take_states(f, in, type);
  take_weights(f, in, type);
  f.zoneout_h = numbers.zoneout_h, f.zoneout_c = numbers.zoneout_c, f.dropout = numbers.dropout;
  f.expected = numbers.expected;
  if (!in[kSeed].defined()) return;
  check_tensor(kLstm, "seed", in[kSeed], {1}, DType::int64);
  f.seed = uint64_t(*in[kSeed].data<int64_t>());
}

void plan_product(Product& product, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch) {
  const int64_t lanes = kernels.lanes[dtype];
  if (product.used)
    product.packed = scratch_rows(scratch, panels_of(product, lanes), product.parts * product.depth * 2 * lanes, dtype);
}

void plan_options(LstmOptions& f, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch) {
  constexpr int64_t kLine = 32;  // numbers: whole vectors of every level
  f.ld_x = round_up(f.I, kLine), f.ld_p = round_up(f.P, kLine), f.ld_h = round_up(f.H, kLine);
  f.ld_z = round_up(4 * f.H, kLine) + kLine;  // no power of two: columns must not fall into one cache set
  f.ld_room = std::max(f.ld_p, f.ld_h);
  for (Product* p : {&f.input_to_gates, &f.hidden_to_gates, &f.cell_to_output, &f.project})
    plan_product(*p, kernels, dtype, scratch);
  f.bias = scratch_rows(scratch, 4, f.H, dtype);
  if (f.peephole) f.peephole = scratch_rows(scratch, 3, f.H, dtype);
  if (f.gamma) f.gamma = scratch_rows(scratch, 9, f.H, dtype), f.beta = scratch_rows(scratch, 9, f.H, dtype);
  f.room = scratch_rows(scratch, f.rows.B, f.ld_room, dtype);
  if (f.dropout > 0) f.mask = scratch_rows(scratch, f.rows.B, f.ld_p, dtype);
}

void bind_lstm_options(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<LstmNumbers>(m, "LstmNumbers")
      .def(py::init<bool, int64_t, double, double, double, bool>(), py::arg("reverse"), py::arg("num_heads"),
           py::arg("zoneout_h"), py::arg("zoneout_c"), py::arg("recurrent_dropout"), py::arg("expected"));
  m.def("lstm_options", &forward, py::arg("outputs"), py::arg("inputs"), py::arg("numbers"));
  m.def("lstm_options_recall", &recall, py::arg("cells"), py::arg("gates"), py::arg("output"), py::arg("inputs"),
        py::arg("numbers"));
  m.def("lstm_options_backward", &lstm_options_backward, py::arg("gradients"), py::arg("upstream"), py::arg("inputs"),
        py::arg("saved"), py::arg("numbers"));
}

}  // namespace mk::cpu
