// lstm, host side: checks, scratch, the loop over chunks and steps that a team runs, the Python binding.
#include "cpu/lstm.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/arena.h"
#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "lstm";

Span share(int64_t n, int rank, int size) { return {n * rank / size, n * (rank + 1) / size}; }

struct Inputs {
  const TensorView &input, &h0, &c0, &weight_ih, &weight_hh, &bias_ih, &bias_hh, &reset, &lengths;
};

void check_matrix(const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, DType dtype) {
  check_tensor(kOp, name, t, sizes, dtype);
  check_inner(kOp, name, t);
}

LstmRows rows_of(const Inputs& in, int64_t T, int64_t B, bool reverse) {
  LstmRows rows{T, B, reverse, nullptr, 0, 0, nullptr, 0};
  if (in.reset.defined()) {
    check_tensor(kOp, "reset", in.reset, {T, B}, DType::boolean);
    rows.reset = in.reset.data<uint8_t>(), rows.reset_t = in.reset.stride(0), rows.reset_b = in.reset.stride(1);
  }
  if (!in.lengths.defined()) return rows;
  check_tensor(kOp, "lengths", in.lengths, {B}, DType::int64);
  rows.lengths = in.lengths.data<int64_t>(), rows.lengths_b = in.lengths.stride(0);
  for (int64_t b = 0; b < B; b++)
    MK_CHECK(rows.length(b) >= 0 && rows.length(b) <= T, kOp, "lengths", "values in 0..T=" + std::to_string(T),
             rows.length(b));
  return rows;
}

// What forward and backward share.
template <class Call>
Call arguments(const Inputs& in, bool reverse) {
  check_rank(kOp, "input", in.input, 3);
  check_float(kOp, "input", in.input);
  check_inner(kOp, "input", in.input);
  check_rank(kOp, "weight_hh", in.weight_hh, 2);
  Call f{};
  const DType dtype = in.input.dtype();
  const int64_t T = in.input.size(0), B = in.input.size(1);
  f.I = in.input.size(2), f.H = in.weight_hh.size(1);
  check_matrix("weight_hh", in.weight_hh, {4 * f.H, f.H}, dtype);
  check_matrix("weight_ih", in.weight_ih, {4 * f.H, f.I}, dtype);
  check_matrix("h0", in.h0, {B, f.H}, dtype);
  check_matrix("c0", in.c0, {B, f.H}, dtype);
  if (in.bias_ih.defined()) check_tensor(kOp, "bias_ih", in.bias_ih, {4 * f.H}, dtype);
  if (in.bias_hh.defined()) check_tensor(kOp, "bias_hh", in.bias_hh, {4 * f.H}, dtype);
  f.rows = rows_of(in, T, B, reverse);
  f.input = in.input.data(), f.input_t = in.input.stride(0), f.input_b = in.input.stride(1);
  f.h0 = in.h0.data(), f.h0_b = in.h0.stride(0), f.c0 = in.c0.data(), f.c0_b = in.c0.stride(0);
  f.weight_ih = in.weight_ih.data(), f.weight_ih_n = in.weight_ih.stride(0);
  f.weight_hh = in.weight_hh.data(), f.weight_hh_n = in.weight_hh.stride(0);
  return f;
}

// Ranks that pay: a barrier costs a few hundred nanoseconds, so a step must be longer than that by far.
int ranks_for(int64_t batch, int64_t hidden, int64_t units) {
  constexpr int64_t kStepFlops = 100000;
  const int64_t ranks = std::min<int64_t>(units, 8 * batch * hidden * hidden / kStepFlops);
  return int(std::clamp<int64_t>(ranks, 1, num_threads()));
}

// Steps of chunk i in running order, as a span of t.
Span chunk_of(const LstmRows& rows, int64_t steps, int64_t i, bool backwards) {
  const int64_t begin = i * steps, end = std::min(begin + steps, rows.T);
  return backwards ? Span{rows.T - end, rows.T - begin} : Span{begin, end};
}

void plan_forward(LstmForward& f, const LstmFormat& format, int64_t steps, int ranks, Scratch& scratch) {
  const int64_t panel = 4 * format.lanes;
  f.panels = tiles_of(f.H, format.lanes);
  f.k_input = round_up(f.I, format.k_multiple), f.k_hidden = round_up(f.H, format.k_multiple);
  f.ld_hidden = round_up(f.H, std::max<int64_t>(32, format.lanes));
  f.chunk = round_up(steps * f.rows.B, format.row_multiple);
  const int64_t hidden_rows = round_up(f.rows.B, format.row_multiple);
  const bool one_stride = f.rows.T == 1 || f.rows.B == 1 || f.input_t == f.rows.B * f.input_b;
  const bool whole = f.I % format.k_multiple == 0 && f.rows.B * steps % format.row_multiple == 0 &&
                     f.rows.B * f.rows.T % format.row_multiple == 0;
  // Weights that stay in cache from step to step are worth more than their reuse within a chunk. The terms of z are
  // added in the same order either way.
  f.fused = f.panels * panel * (f.k_input + f.k_hidden) * format.pack_bytes <= ranks * format.fused_bytes &&
            f.I % format.k_multiple == 0 && f.rows.B % format.row_multiple == 0;
  f.ld_x = f.rows.B == 1 ? f.input_t : f.input_b;
  if (f.fused) {
    // The input is read where it lies.
  } else if (format.gather || !one_stride || !whole) {
    f.ld_x = f.k_input;
    f.x = scratch.take<char>(f.chunk * f.ld_x * format.pack_bytes);
  }
  f.packed_ih = scratch.take<char>(f.panels * f.k_input * panel * format.pack_bytes);
  f.packed_hh = scratch.take<char>(f.panels * f.k_hidden * panel * format.pack_bytes);
  f.bias = scratch.take<char>(f.panels * panel * format.sum_bytes);
  if (!f.fused) f.projected = scratch.take<char>(f.panels * f.chunk * panel * format.sum_bytes);
  for (void*& hidden : f.hidden) hidden = scratch.take<char>(hidden_rows * f.ld_hidden * format.pack_bytes);
  f.carry = scratch.take<char>(f.rows.B * f.ld_hidden * format.sum_bytes);
}

void run_forward(const LstmForward& f, const LstmKernels& kernels, int dtype, int64_t steps, int rank, int size,
                 Barrier& barrier) {
  const LstmFormat& format = kernels.format[dtype];
  const int64_t B = f.rows.B;
  const Span step_units = share(f.panels * tiles_of(B, format.row_tile), rank, size);
  kernels.pack[dtype](f, share(f.panels, rank, size));
  kernels.start[dtype](f, share(B, rank, size));
  int64_t parity = 0;
  for (int64_t i = 0; i * steps < f.rows.T; i++) {
    const Span chunk = chunk_of(f.rows, steps, i, f.rows.reverse);
    const int64_t count = (chunk.end - chunk.begin) * B;
    if (f.x) kernels.gather[dtype](f, chunk, share(count, rank, size));
    barrier.wait();
    if (!f.fused) {
      kernels.project[dtype](f, chunk, share(f.panels * tiles_of(count, format.row_tile), rank, size));
      barrier.wait();
    }
    for (int64_t s = 0; s < chunk.end - chunk.begin; s++, parity ^= 1) {
      const int64_t at = f.rows.reverse ? chunk.end - chunk.begin - 1 - s : s;
      kernels.step[dtype](f, chunk.begin + at, at * B, parity, step_units);
      barrier.wait();
    }
  }
}

void forward(const TensorView& output, const TensorView& h_n, const TensorView& c_n, const TensorView& cells,
             const TensorView& gates, const InputView& input, const InputView& h0, const InputView& c0,
             const InputView& weight_ih, const InputView& weight_hh, const InputView& bias_ih, const InputView& bias_hh,
             const TensorView& reset, const TensorView& lengths, bool reverse) {
  auto f = arguments<LstmForward>({input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths}, reverse);
  const DType type = input.dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  check_output(kOp, "output", output, {T, B, f.H}, type);
  check_output(kOp, "h_n", h_n, {B, f.H}, type);
  check_output(kOp, "c_n", c_n, {B, f.H}, type);
  if (cells.defined()) check_output(kOp, "cells", cells, {T, B, f.H}, type);
  if (gates.defined()) check_output(kOp, "gates", gates, {T, B, 4 * f.H}, type);
  for (const TensorView* saved : {&output, &cells, &gates})
    if (saved->defined()) prefer_huge_pages(saved->data(), saved->numel() * item_size(type));
  f.output = output.data(), f.h_n = h_n.data(), f.c_n = c_n.data();
  f.cells = cells.defined() ? cells.data() : nullptr, f.gates = gates.defined() ? gates.data() : nullptr;
  f.bias_ih = bias_ih.defined() ? bias_ih.data() : nullptr, f.bias_hh = bias_hh.defined() ? bias_hh.data() : nullptr;
  const int dtype = int(type);
  const auto& kernels = select(lstm_levels);
  const LstmFormat& format = kernels.format[dtype];
  pybind11::gil_scoped_release nogil;
  if (B == 0 || f.H == 0) return;
  Scratch scratch;
  // The input part of z for a chunk should stay in the L2 cache. Products of 16-bit operands are so fast that reading
  // the weights again for every chunk costs more than that. No result depends on where chunks end.
  const int64_t projected_bytes = int64_t(format.pack_bytes == 2 ? 4 : 1) << 20;
  const int64_t rows = std::clamp<int64_t>(projected_bytes / (4 * f.H * format.sum_bytes), 64, 512);
  const int64_t steps = std::clamp<int64_t>(rows / B, 1, std::max<int64_t>(T, 1));
  const int ranks = ranks_for(B, f.H, tiles_of(f.H, format.lanes) * tiles_of(B, format.row_tile));
  plan_forward(f, format, steps, ranks, scratch);
  team(ranks,
       [&](int rank, int size, Barrier& barrier) { run_forward(f, kernels, dtype, steps, rank, size, barrier); });
}

// Of a rank: the rows of two operands, then a packed panel of one.
int64_t operand_bytes(const LstmBackward& f, const LstmFormat& format) {
  return f.chunk * (2 * int64_t(sizeof(void*)) + 2 * format.lanes * format.pack_bytes);
}

void plan_backward(LstmBackward& f, const LstmFormat& format, int dtype, int64_t steps, int ranks, Scratch& scratch,
                   char*& operand) {
  const int64_t panel = 2 * format.lanes, gates = 4 * f.H;
  const bool is_sum = dtype <= int(DType::float32);  // the element type is the type of sums
  f.k_gates = round_up(gates, format.k_multiple);
  f.ld_gates = round_up(gates, 32) + 32;  // no power of two: columns of dz must not fall into one cache set
  f.ld_hidden = round_up(f.H, std::max<int64_t>(32, panel));
  f.chunk = round_up(steps * f.rows.B, 32);
  const int64_t dz_rows = f.chunk + format.row_multiple;  // the last step's tiles may reach past the chunk
  f.packed_hh = scratch.take<char>(tiles_of(f.H, panel) * panel * f.k_gates * format.pack_bytes);
  if (f.dinput) f.packed_ih = scratch.take<char>(tiles_of(f.I, panel) * panel * f.k_gates * format.pack_bytes);
  for (void*& dz : f.dz) dz = scratch.take<char>(dz_rows * f.ld_gates * format.pack_bytes);
  f.dh = scratch.take<char>(f.rows.B * f.ld_hidden * format.sum_bytes);
  f.dc = scratch.take<char>(f.rows.B * f.ld_hidden * format.sum_bytes);
  f.sum_ih = f.dweight_ih, f.sum_hh = f.dweight_hh;
  if (!is_sum && f.sum_ih) f.sum_ih = scratch.take<char>(gates * f.I * format.sum_bytes);
  if (!is_sum && f.sum_hh) f.sum_hh = scratch.take<char>(gates * f.H * format.sum_bytes);
  f.sum_bias = scratch.take<char>(gates * format.sum_bytes);
  operand = scratch.take<char>(ranks * operand_bytes(f, format));
}

// The products over a whole chunk, whose dz is complete.
void run_products(const LstmBackward& f, const LstmKernels& kernels, int dtype, Span chunk, const void* dz,
                  void* operand, int rank, int size, Barrier& barrier) {
  const LstmFormat& format = kernels.format[dtype];
  const int64_t count = (chunk.end - chunk.begin) * f.rows.B, panel = 2 * format.lanes, gates = 4 * f.H;
  const int64_t panels = (f.sum_ih ? tiles_of(f.I, panel) : 0) + (f.sum_hh ? tiles_of(f.H, panel) : 0);
  if (kernels.arrange[dtype]) {
    kernels.arrange[dtype](f, chunk, dz, operand, share(tiles_of(gates, 32) + panels, rank, size));
    barrier.wait();
  }
  if (f.dinput)
    kernels.input_backward[dtype](f, chunk, dz, share(tiles_of(f.I, panel) * tiles_of(count, format.tile), rank, size));
  if (f.dbias_ih || f.dbias_hh) {
    const Span blocks = share(tiles_of(gates, 64), rank, size);
    kernels.bias_backward[dtype](f, chunk, dz, {blocks.begin * 64, std::min(blocks.end * 64, gates)});
  }
  kernels.weight_backward[dtype](f, chunk, dz, operand, share(panels * tiles_of(gates, format.gate_tile), rank, size));
}

void run_backward(const LstmBackward& f, const LstmKernels& kernels, int dtype, int64_t steps, char* operand, int rank,
                  int size, Barrier& barrier) {
  const LstmFormat& format = kernels.format[dtype];
  const int64_t B = f.rows.B, panel = 2 * format.lanes;
  const Span units = share(tiles_of(f.H, panel) * tiles_of(B, format.tile), rank, size);
  kernels.pack_backward[dtype](f, share(tiles_of(f.H, panel) + (f.dinput ? tiles_of(f.I, panel) : 0), rank, size));
  kernels.start_backward[dtype](f, share(B, rank, size));
  barrier.wait();
  for (int64_t i = 0; i * steps < f.rows.T; i++) {
    const Span chunk = chunk_of(f.rows, steps, i, !f.rows.reverse);
    char* dz = static_cast<char*>(f.dz[i % 2]);
    for (int64_t s = 0; s < chunk.end - chunk.begin; s++) {
      const int64_t at = f.rows.reverse ? s : chunk.end - chunk.begin - 1 - s;
      char* step = dz + at * B * f.ld_gates * format.pack_bytes;
      kernels.gates_backward[dtype](f, chunk.begin + at, step, units);
      barrier.wait();
      kernels.state_backward[dtype](f, chunk.begin + at, step, units);
    }
    run_products(f, kernels, dtype, chunk, dz, operand + rank * operand_bytes(f, format), rank, size, barrier);
  }
  barrier.wait();
  kernels.finish_backward[dtype](f, share(B, rank, size), share(4 * f.H, rank, size));
}

struct Upstream {
  const TensorView &doutput, &dh_n, &dc_n, &dcells;
};
struct Gradients {
  const TensorView &dinput, &dh0, &dc0, &dweight_ih, &dweight_hh, &dbias_ih, &dbias_hh;
};

void take_upstream(LstmBackward& f, const Upstream& from, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B;
  auto take = [&](const char* name, const TensorView& t, bool steps, const void*& data, int64_t* stride_t,
                  int64_t& stride_b) {
    if (!t.defined()) return;
    if (steps)
      check_matrix(name, t, {T, B, f.H}, type), *stride_t = t.stride(0);
    else
      check_matrix(name, t, {B, f.H}, type);
    data = t.data(), stride_b = t.stride(steps ? 1 : 0);
  };
  take("doutput", from.doutput, true, f.doutput, &f.doutput_t, f.doutput_b);
  take("dcells", from.dcells, true, f.dcells, &f.dcells_t, f.dcells_b);
  take("dh_n", from.dh_n, false, f.dh_n, nullptr, f.dh_n_b);
  take("dc_n", from.dc_n, false, f.dc_n, nullptr, f.dc_n_b);
}

void take_gradients(LstmBackward& f, const Gradients& to, DType type) {
  auto take = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> sizes, void*& data) {
    if (!t.defined()) return;
    check_output(kOp, name, t, sizes, type);
    data = t.data();
    prefer_huge_pages(data, t.numel() * item_size(type));
  };
  const int64_t T = f.rows.T, B = f.rows.B;
  take("dinput", to.dinput, {T, B, f.I}, f.dinput);
  take("dh0", to.dh0, {B, f.H}, f.dh0);
  take("dc0", to.dc0, {B, f.H}, f.dc0);
  take("dweight_ih", to.dweight_ih, {4 * f.H, f.I}, f.dweight_ih);
  take("dweight_hh", to.dweight_hh, {4 * f.H, f.H}, f.dweight_hh);
  take("dbias_ih", to.dbias_ih, {4 * f.H}, f.dbias_ih);
  take("dbias_hh", to.dbias_hh, {4 * f.H}, f.dbias_hh);
}

// Without a step no sum is ever written.
void zero_sums(const LstmBackward& f, int64_t item) {
  const std::pair<void*, int64_t> all[] = {
      {f.dweight_ih, 4 * f.H * f.I}, {f.dweight_hh, 4 * f.H * f.H}, {f.dbias_ih, 4 * f.H}, {f.dbias_hh, 4 * f.H}};
  for (const auto& [data, count] : all)
    if (data) std::memset(data, 0, count * item);
}

void backward(const Gradients& to, const Upstream& from, const Inputs& in, const TensorView& output,
              const TensorView& cells, const TensorView& gates, bool reverse) {
  auto f = arguments<LstmBackward>(in, reverse);
  const DType type = in.input.dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  check_output(kOp, "output", output, {T, B, f.H}, type);
  check_output(kOp, "cells", cells, {T, B, f.H}, type);
  check_output(kOp, "gates", gates, {T, B, 4 * f.H}, type);
  f.output = output.data(), f.cells = cells.data(), f.gates = gates.data();
  take_upstream(f, from, type);
  take_gradients(f, to, type);
  const int dtype = int(type);
  const auto& kernels = select(lstm_levels);
  const LstmFormat& format = kernels.format[dtype];
  pybind11::gil_scoped_release nogil;
  if (T * B == 0) zero_sums(f, item_size(type));
  if (B == 0 || f.H == 0) {
    if (f.dinput) std::memset(f.dinput, 0, T * B * f.I * item_size(type));
    return;
  }
  const int64_t steps = std::clamp<int64_t>(format.chunk_rows / B, 1, std::max<int64_t>(T, 1));
  const int ranks = ranks_for(B, f.H, tiles_of(f.H, 2 * format.lanes) * tiles_of(B, format.tile));
  Scratch scratch;
  char* operand = nullptr;
  plan_backward(f, format, dtype, steps, ranks, scratch, operand);
  if (kernels.arrange[dtype]) {
    f.transposed = scratch.take<char>(round_up(4 * f.H, 32) * f.chunk * format.pack_bytes);
    f.operand = scratch.take<char>((round_up(f.I, 32) + round_up(f.H, 32)) * f.chunk * format.pack_bytes);
  }
  team(ranks, [&](int rank, int size, Barrier& barrier) {
    run_backward(f, kernels, dtype, steps, operand, rank, size, barrier);
  });
}

}  // namespace

void bind_lstm(pybind11::module_& m) {
  namespace py = pybind11;
  using View = const TensorView&;
  using In = const InputView&;
  m.def("lstm", &forward, py::arg("output"), py::arg("h_n"), py::arg("c_n"), py::arg("cells"), py::arg("gates"),
        py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"),
        py::arg("bias_hh"), py::arg("reset"), py::arg("lengths"), py::arg("reverse"));
  // d<inputs>, d<outputs>, inputs, saved outputs: the order of a backend's backward.
  m.def("lstm_backward", [](View dinput, View dh0, View dc0, View dweight_ih, View dweight_hh, View dbias_ih,
                            View dbias_hh, In doutput, In dh_n, In dc_n, In dcells, In input, In h0, In c0,
                            In weight_ih, In weight_hh, View bias_ih, View bias_hh, View reset, View lengths,
                            View output, View cells, View gates, bool reverse) {
    backward({dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh}, {doutput, dh_n, dc_n, dcells},
             {input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths}, output, cells, gates, reverse);
  });
}

}  // namespace mk::cpu
