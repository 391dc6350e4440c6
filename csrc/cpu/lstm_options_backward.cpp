// lstm with options, backward, host side.
#include <cstring>

#include "common/pages.h"
#include "cpu/lstm_options_host.h"

namespace mk::cpu {
namespace {

// The gradients of a call, in the order of the op's differentiable inputs.
enum Gradient : int {
  kDInput,
  kDH0,
  kDC0,
  kDWeightIh,
  kDWeightHh,
  kDBiasIh,
  kDBiasHh,
  kDWeightHr,
  kDPeephole,
  kDNormWeight,
  kDNormBias,
  kDWeightCo,
  kDResetH,
  kDResetC,
  kGradients
};
using Gradients = std::vector<TensorView>;

// Where a sum over all steps goes in the end; a null `sum` leaves zeros.
struct Rounding {
  void *sum, *out;
  int64_t count;
};

// The sums over rows and steps: in chunks, each from zero, so that no chain of additions is long.
struct Sums {
  std::vector<WeightSum> weights;
  std::vector<ColumnSum> columns;
  std::vector<Rounding> roundings;
};

void take_upstream(LstmOptionsBackward& f, const LstmInputs& from, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B;
  const TensorView &doutput = from[0], &dh_n = from[1], &dc_n = from[2], &dcells = from[3];
  if (doutput.defined()) {
    check_rows("doutput", doutput, {T, B, f.P}, type);
    f.doutput = doutput.data(), f.doutput_t = doutput.stride(0), f.doutput_b = doutput.stride(1);
  }
  if (dcells.defined()) {
    check_rows("dcells", dcells, {T, B, f.H}, type);
    f.dcells = dcells.data(), f.dcells_t = dcells.stride(0), f.dcells_b = dcells.stride(1);
  }
  if (dh_n.defined()) check_rows("dh_n", dh_n, {B, f.P}, type), f.dh_n = dh_n.data(), f.dh_n_b = dh_n.stride(0);
  if (dc_n.defined()) check_rows("dc_n", dc_n, {B, f.H}, type), f.dc_n = dc_n.data(), f.dc_n_b = dc_n.stride(0);
}

void check_gradients(const LstmOptionsBackward& f, const Gradients& to, DType type) {
  const int64_t T = f.rows.T, B = f.rows.B, H = f.H;
  const auto check = [&](int i, const char* name, std::initializer_list<int64_t> sizes) {
    if (!to[i].defined()) return;
    check_output(kLstm, name, to[i], sizes, type);
    prefer_huge_pages(to[i].data(), to[i].numel() * item_size(type));
  };
  check(kDInput, "dinput", {T, B, f.I});
  check(kDH0, "dh0", {B, f.P}), check(kDC0, "dc0", {B, H});
  check(kDWeightIh, "dweight_ih", {4 * H, f.I}), check(kDWeightHh, "dweight_hh", {4 * H, f.P / f.heads});
  check(kDBiasIh, "dbias_ih", {4 * H}), check(kDBiasHh, "dbias_hh", {4 * H});
  check(kDWeightHr, "dweight_hr", {f.P, H}), check(kDPeephole, "dpeephole", {3, H});
  check(kDNormWeight, "dnorm_weight", {9 * H}), check(kDNormBias, "dnorm_bias", {9 * H});
  check(kDWeightCo, "dweight_co", {H, H});
  check(kDResetH, "dreset_h", {T, B, f.P}), check(kDResetC, "dreset_c", {T, B, H});
}

// A row of the result is the transposed weight times a row of the operand.
Product transposed(const Product& p) {
  Product out = p;
  out.width = p.depth, out.depth = p.width, out.column_stride = 1, out.depth_stride = p.column_stride;
  return out;
}

void plan_products(LstmOptionsBackward& f, const LstmOptionsKernels& kernels, int dtype, Scratch& scratch) {
  f.gates_to_input = transposed(f.input_to_gates), f.gates_to_input.used = f.dinput;
  f.output_to_cell = transposed(f.cell_to_output), f.unproject = transposed(f.project);
  f.gates_to_hidden = transposed(f.hidden_to_gates);
  if (f.heads > 1) {
    Product& p = f.gates_to_hidden;
    p.segments = f.heads, p.parts = 4, p.part_step = f.H, p.segment_step = f.H / f.heads;
    p.part_stride = f.H * p.depth_stride;
  }
  for (Product* p : {&f.gates_to_input, &f.gates_to_hidden, &f.output_to_cell, &f.unproject})
    plan_product(*p, kernels, dtype, scratch);
}

void plan_buffers(LstmOptionsBackward& f, int dtype, Scratch& scratch) {
  const auto take = [&](int64_t rows, int64_t ld) { return scratch.take<char>(rows * ld * sum_bytes(dtype)); };
  const int64_t B = f.rows.B;
  f.x = take(f.chunk, f.ld_x), f.operand = take(f.chunk, f.ld_p), f.dz = take(f.chunk, f.ld_z);
  f.c_old = take(f.chunk, f.ld_h), f.c_new = take(f.chunk, f.ld_h), f.tanh_c = take(f.chunk, f.ld_h);
  if (f.projects()) f.q = take(f.chunk, f.ld_h), f.dh_new = take(f.chunk, f.ld_p);
  if (f.gamma) {
    f.normal_c = take(f.chunk, f.ld_h), f.dy = take(f.chunk, f.ld_h);
    f.normal_x = take(f.chunk, f.ld_z), f.normal_h = take(f.chunk, f.ld_z);
    f.dz_hidden = take(f.chunk, f.ld_z), f.dz_input = take(f.chunk, f.ld_z);
    f.scale_x = take(f.chunk, 1), f.scale_h = take(f.chunk, 1), f.scale_c = take(f.chunk, 1);
  }
  f.dh = take(B, f.ld_p), f.dc = take(B, f.ld_h), f.dq = take(B, f.ld_h), f.dc_new = take(B, f.ld_h);
  f.dproduct = take(B, f.ld_p);
  if (f.cell_gate()) f.dc_output = take(B, f.ld_h);
}

const void* column(const void* rows, int64_t at, int dtype) {
  return static_cast<const char*>(rows) + at * sum_bytes(dtype);
}

// Weights: dz^T times what was multiplied.
void plan_weights(const LstmOptionsBackward& f, const Gradients& to, int dtype, Scratch& scratch, Sums& sums) {
  const int64_t H = f.H, NH = f.heads;
  const void* dz_input = f.gamma ? f.dz_input : f.dz;
  const void* dz_hidden = f.gamma ? f.dz_hidden : f.dz;
  const auto add = [&](int which, WeightSum w) {
    const TensorView& out = to[which];
    if (!out.defined()) return;
    const bool direct = dtype <= int(DType::float32);  // the element type is the type of sums
    const int64_t count = w.gates * w.heads * w.rows * w.width;
    w.sum = direct ? out.data() : scratch.take<char>(count * sum_bytes(dtype));
    sums.weights.push_back(w);
    if (!direct) sums.roundings.push_back({w.sum, out.data(), count});
    const int64_t rest = out.numel() - count;  // rows that the output gate ignores
    if (rest)
      sums.roundings.push_back({nullptr, static_cast<char*>(out.data()) + count * item_size(out.dtype()), rest});
  };
  add(kDWeightIh, {1, 1, f.input_gates(), f.I, dz_input, f.x, f.ld_z, f.ld_x, nullptr});
  add(kDWeightHh, NH == 1 ? WeightSum{1, 1, 4 * H, f.P, dz_hidden, f.operand, f.ld_z, f.ld_p, nullptr}
                          : WeightSum{4, NH, H / NH, f.P / NH, dz_hidden, f.operand, f.ld_z, f.ld_p, nullptr});
  if (f.cell_gate()) add(kDWeightCo, {1, 1, H, H, column(f.dz, 3 * H, dtype), f.c_new, f.ld_z, f.ld_h, nullptr});
  if (f.projects()) add(kDWeightHr, {1, 1, f.P, H, f.dh_new, f.q, f.ld_p, f.ld_h, nullptr});
}

// Vectors: sums of columns, of dz alone or times what it was multiplied with.
void plan_vectors(const LstmOptionsBackward& f, const Gradients& to, int dtype, Scratch& scratch, Sums& sums) {
  const int64_t H = f.H, seen = f.input_gates();
  const auto round_to = [&](int which, int64_t at, void* sum, int64_t count) {
    const TensorView& out = to[which];
    if (out.defined() && count > 0)
      sums.roundings.push_back({sum, static_cast<char*>(out.data()) + at * item_size(out.dtype()), count});
  };
  const auto total = [&](const void* a, const void* b, int64_t lda, int64_t ldb, int64_t width) {
    void* sum = scratch.take<char>(width * sum_bytes(dtype));
    sums.columns.push_back({a, b, lda, ldb, width, sum});
    return sum;
  };
  if (to[kDBiasIh].defined() || to[kDBiasHh].defined() || to[kDNormBias].defined()) {
    void* sum = total(f.dz, nullptr, f.ld_z, 0, 4 * H);
    round_to(kDBiasIh, 0, sum, 4 * H), round_to(kDBiasHh, 0, sum, 4 * H);
    round_to(kDNormBias, 0, sum, seen), round_to(kDNormBias, 4 * H, sum, 4 * H);
  }
  if (to[kDPeephole].defined())
    for (int64_t gate = 0; gate < 3; gate++)
      round_to(kDPeephole, gate * H,
               total(column(f.dz, (gate == 2 ? 3 : gate) * H, dtype), gate == 2 ? f.c_new : f.c_old, f.ld_z, f.ld_h, H),
               H);
  if (to[kDNormWeight].defined()) {
    round_to(kDNormWeight, 0, total(f.dz, f.normal_x, f.ld_z, f.ld_z, seen), seen);
    round_to(kDNormWeight, 4 * H, total(f.dz, f.normal_h, f.ld_z, f.ld_z, 4 * H), 4 * H);
    round_to(kDNormWeight, 8 * H, total(f.dy, f.normal_c, f.ld_h, f.ld_h, H), H);
  }
  if (to[kDNormBias].defined()) round_to(kDNormBias, 8 * H, total(f.dy, nullptr, f.ld_h, 0, H), H);
  for (int which : {kDNormWeight, kDNormBias}) round_to(which, seen, nullptr, 4 * H - seen);
}

void run_step(const LstmOptionsBackward& f, const LstmTeam& team, int64_t t, int64_t row) {
  const auto& k = team.kernels;
  const int64_t B = f.rows.B;
  const Span rows = team.share(B);
  k.states_backward[team.dtype](f, t, row, rows);
  if (f.projects()) {
    team.wait();
    team.multiply(f.unproject, team.at(f.dh_new, row, f.ld_p), f.ld_p, B, f.dq, f.ld_h);
    team.wait();
  }
  k.outputs_backward[team.dtype](f, t, row, rows);
  if (f.cell_gate()) {
    team.wait();
    team.multiply(f.output_to_cell, team.at(f.dz, row, f.ld_z, 3 * f.H), f.ld_z, B, f.dc_output, f.ld_h);
    team.wait();
  }
  k.gates_backward[team.dtype](f, t, row, rows);
  team.wait();
  team.multiply(f.gates_to_hidden, team.at(f.gamma ? f.dz_hidden : f.dz, row, f.ld_z), f.ld_z, B, f.dproduct, f.ld_p);
  team.wait();
}

// What the steps of a chunk need of forward.
void run_recall(const LstmOptionsBackward& f, const LstmTeam& team, Span chunk) {
  const auto& k = team.kernels;
  const int64_t count = (chunk.end - chunk.begin) * f.rows.B;
  k.recall[team.dtype](f, chunk, team.share(count));
  team.wait();
  if (!f.gamma) return;
  team.multiply(f.input_to_gates, f.x, f.ld_x, count, f.normal_x, f.ld_z);
  team.multiply(f.hidden_to_gates, f.operand, f.ld_p, count, f.normal_h, f.ld_z);
  team.wait();
  k.normalise[team.dtype](f, team.share(count));
  team.wait();
}

// The sums and the gradient of the input over a chunk, whose dz is complete.
void run_sums(const LstmOptionsBackward& f, const LstmTeam& team, const Sums& sums, void* panel, Span chunk) {
  const auto& k = team.kernels;
  const int64_t count = (chunk.end - chunk.begin) * f.rows.B, lanes = k.lanes[team.dtype];
  const bool fresh = f.first_chunk(chunk);
  if (f.gamma) {
    k.finish_input_backward[team.dtype](f, team.share(count));
    team.wait();
  }
  for (const WeightSum& w : sums.weights) {
    const int64_t tiles = tiles_of(w.rows, k.row_tile[team.dtype]);
    const int64_t units = w.heads * tiles_of(w.width, 2 * lanes) * w.gates * tiles;
    k.weight_sum[team.dtype](w, count, fresh, panel, team.share(units));
  }
  constexpr int64_t kColumns = 64;
  for (const ColumnSum& s : sums.columns) {
    const Span blocks = team.share(tiles_of(s.width, kColumns));
    k.column_sum[team.dtype](s, count, fresh, {blocks.begin * kColumns, std::min(blocks.end * kColumns, s.width)});
  }
  team.wait();
  if (!f.dinput) return;
  team.multiply(f.gates_to_input, f.gamma ? f.dz_input : f.dz, f.ld_z, count, f.x, f.ld_x);
  team.wait();
  k.store_input[team.dtype](f, chunk, f.x, team.share(count));
  team.wait();
}

void run_backward(const LstmOptionsBackward& f, const LstmTeam& team, const Gradients& to, const Sums& sums,
                  char* panels) {
  const auto& k = team.kernels;
  const int64_t B = f.rows.B, steps = f.chunk / B, panel = f.chunk * 2 * k.lanes[team.dtype] * sum_bytes(team.dtype);
  const Span rows = team.share(B);
  team.prepare(f);
  for (const Product* p : {&f.gates_to_input, &f.gates_to_hidden, &f.output_to_cell, &f.unproject}) team.pack(*p);
  k.start_backward[team.dtype](f, rows);
  team.wait();
  int64_t done = -1;
  for (int64_t i = 0; i * steps < f.rows.T; i++) {
    const Span chunk = steps_of(f.rows, steps, i, !f.rows.reverse);
    run_recall(f, team, chunk);
    for (int64_t s = 0; s < chunk.end - chunk.begin; s++) {
      const int64_t at = f.rows.reverse ? s : chunk.end - chunk.begin - 1 - s;
      if (done >= 0) k.arrive[team.dtype](f, done, rows);
      run_step(f, team, done = chunk.begin + at, at * B);
    }
    run_sums(f, team, sums, panels + team.rank * panel, chunk);
  }
  if (done >= 0) k.arrive[team.dtype](f, done, rows);
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (f.dh0)
      k.round[team.dtype](team.at(f.dh, b, f.ld_p), static_cast<char*>(f.dh0) + b * f.P * item_size(to[kDH0].dtype()),
                          0, f.P);
    if (f.dc0)
      k.round[team.dtype](team.at(f.dc, b, f.ld_h), static_cast<char*>(f.dc0) + b * f.H * item_size(to[kDC0].dtype()),
                          0, f.H);
  }
  for (const Rounding& r : sums.roundings) {
    const Span part = team.share(r.count);
    if (r.sum && done >= 0) k.round[team.dtype](r.sum, r.out, part.begin, part.end);
  }
}

void zero(const TensorView& t) {
  if (t.defined() && t.numel() > 0) std::memset(t.data(), 0, t.numel() * item_size(t.dtype()));
}

void run(LstmOptionsBackward& f, const Gradients& to, DType type) {
  const int dtype = int(type);
  const auto& kernels = select(lstm_options_levels);
  pybind11::gil_scoped_release nogil;
  const int64_t B = f.rows.B;
  if (f.rows.T * B == 0)
    for (const TensorView& t : to) zero(t);  // without a step no sum is ever written
  if (B == 0) return;
  Scratch scratch;
  // What the steps read of forward should stay in the L2 cache.
  const int64_t bytes = std::max<int64_t>(4 * f.H * sum_bytes(dtype) * (f.gamma ? 6 : 2), 1);
  const int64_t rows = std::clamp<int64_t>((int64_t(1) << 20) / bytes, 64, 256);
  f.chunk = std::clamp<int64_t>(rows / B, 1, std::max<int64_t>(f.rows.T, 1)) * B;
  plan_options(f, kernels, dtype, scratch);
  plan_products(f, kernels, dtype, scratch);
  plan_buffers(f, dtype, scratch);
  Sums sums;
  plan_weights(f, to, dtype, scratch, sums);
  plan_vectors(f, to, dtype, scratch, sums);
  for (const Rounding& r : sums.roundings)
    if (!r.sum) std::memset(r.out, 0, r.count * item_size(type));
  const int ranks = ranks_of(f);
  char* panels = scratch.take<char>(ranks * f.chunk * 2 * kernels.lanes[dtype] * sum_bytes(dtype));
  team(ranks, [&](int rank, int size, Barrier& barrier) {
    run_backward(f, {kernels, dtype, rank, size, barrier}, to, sums, panels);
  });
}

}  // namespace

void lstm_options_backward(const Gradients& to, const LstmInputs& upstream, const LstmInputs& in,
                           const std::vector<TensorView>& saved, const LstmNumbers& numbers) {
  LstmOptionsBackward f{};
  take_inputs(f, in, numbers);
  const DType type = in[kInput].dtype();
  const int64_t T = f.rows.T, B = f.rows.B;
  const TensorView &output = saved[0], &cells = saved[1], &gates = saved[2];
  check_output(kLstm, "output", output, {T, B, f.P}, type);
  check_output(kLstm, "cells", cells, {T, B, f.H}, type);
  check_output(kLstm, "gates", gates, {T, B, 4 * f.H}, type);
  f.output = output.data(), f.cells = cells.data(), f.gates = gates.data();
  take_upstream(f, upstream, type);
  check_gradients(f, to, type);
  f.dinput = data_of(to[kDInput]), f.dh0 = data_of(to[kDH0]), f.dc0 = data_of(to[kDC0]);
  f.dreset_h = data_of(to[kDResetH]), f.dreset_c = data_of(to[kDResetC]);
  run(f, to, type);
}

}  // namespace mk::cpu
