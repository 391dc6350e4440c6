// The recurrent family backward, host side: scratch, and the loop over chunks and lines that a team runs.
#include <cstring>
#include <utility>

#include "cpu/recurrent_host.h"

namespace mk::cpu {
namespace {

// What the run of one rank needs besides the arguments.
struct Run {
  const RecurrentKernels& kernels;
  const Lengths& lengths;
  int dtype;
  int64_t lines, item;                 // lines of a chunk, bytes of an element
  char* operand;                       // of all ranks
  uint64_t *steps, *inputs, *weights;  // of Deals: each its own, for no barrier lies between the two products
};

// Of a rank: the rows of two operands, then a packed panel of one.
int64_t operand_bytes(const RecurrentBackward& f, const RecurrentFormat& format) {
  return f.chunk * (2 * int64_t(sizeof(void*)) + 2 * format.lanes * format.pack_bytes);
}

void plan_backward(RecurrentBackward& f, const RecurrentFormat& format, Run& run, int ranks, Scratch& scratch) {
  const int64_t panel = 2 * format.lanes, gates = f.gate_rows();
  const bool is_sum = run.dtype <= int(DType::float32);  // the element type is the type of sums
  f.k_gates = round_up(gates, format.k_multiple);
  // No power of two: columns of dz must not fall into one cache set.
  f.ld_gates = round_up(f.columns(), 32) + 32;
  f.ld_hidden = round_up(f.H, std::max<int64_t>(32, panel));
  f.chunk = round_up(run.lines * f.rows.rows, 32);
  const int64_t dz_rows = f.chunk + format.row_multiple;  // the last line's tiles may reach past the chunk
  f.packed_hh = scratch.take<char>(tiles_of(f.H, panel) * panel * f.k_gates * format.pack_bytes);
  if (f.dinput) f.packed_ih = scratch.take<char>(tiles_of(f.I, panel) * panel * f.k_gates * format.operand_bytes());
  for (void*& dz : f.dz) dz = scratch.take<char>(dz_rows * f.ld_gates * format.pack_bytes);
  f.dh = scratch.take<char>(f.rows.rows * f.ld_hidden * format.sum_bytes);
  if (f.shape().cell_state) f.dc = scratch.take<char>(f.rows.rows * f.ld_hidden * format.sum_bytes);
  f.sum_ih = f.dweight_ih, f.sum_hh = f.dweight_hh;
  if (!is_sum && f.sum_ih) f.sum_ih = scratch.take<char>(gates * f.I * format.sum_bytes);
  if (!is_sum && f.sum_hh) f.sum_hh = scratch.take<char>(gates * f.H * format.sum_bytes);
  f.sum_bias = scratch.take<char>(f.columns() * format.sum_bytes);
  run.operand = scratch.take<char>(ranks * operand_bytes(f, format));
  if (!run.kernels.arrange[run.dtype]) return;
  f.transposed = scratch.take<char>(round_up(f.columns(), 32) * f.chunk * format.operand_bytes());
  f.operand = scratch.take<char>((round_up(f.I, 32) + round_up(f.H, 32)) * f.chunk * format.operand_bytes());
  if (f.dinput && format.product_bytes)
    f.left = scratch.take<char>(round_up(f.chunk, 32) * f.k_gates * format.product_bytes);
}

// The products over a whole chunk, whose dz is complete.
void run_products(const RecurrentBackward& f, const Run& run, Span chunk, const void* dz, int rank, int size,
                  Barrier& barrier) {
  const RecurrentKernels& kernels = run.kernels;
  const RecurrentFormat& format = kernels.format[run.dtype];
  const int64_t count = (chunk.end - chunk.begin) * f.rows.rows, panel = 2 * format.lanes;
  const int64_t panels = (f.sum_ih ? tiles_of(f.I, panel) : 0) + (f.sum_hh ? tiles_of(f.H, panel) : 0);
  char* operand = run.operand + rank * operand_bytes(f, format);
  // Arranged operands hold all columns of dz, others only those of one weight.
  int64_t columns = f.gate_rows();
  if (kernels.arrange[run.dtype]) {
    columns = f.columns();
    kernels.arrange[run.dtype](f, chunk, dz, operand, share(tiles_of(columns, 32) + panels, rank, size));
    barrier.wait();
  }
  // Units are dealt unless those of a call share what they read: operand tiles in cache (amx/).
  if (f.dinput) {
    const int64_t units = tiles_of(f.I, panel) * tiles_of(count, format.product_rows(format.tile));
    const auto input_backward = [&](Span some) { kernels.input_backward[run.dtype](f, chunk, dz, some); };
    if (format.matrix_units())
      input_backward(share(units, rank, size));
    else
      deal_pieces(units, rank, size, run.inputs, input_backward);
  }
  if (f.dbias_ih || f.dbias_hh) {
    const Span blocks = share(tiles_of(f.columns(), 64), rank, size);
    kernels.bias_backward[run.dtype](f, chunk, dz, {blocks.begin * 64, std::min(blocks.end * 64, f.columns())});
  }
  const int64_t units = panels * tiles_of(columns, format.gate_tile);
  const auto weight_backward = [&](Span some) { kernels.weight_backward[run.dtype](f, chunk, dz, operand, some); };
  if (format.product_bytes)
    weight_backward(share(units, rank, size));
  else
    deal_pieces(units, rank, size, run.weights, weight_backward);
}

// Gradients of what has no step: sequences of length 0, inputs past the ends, states given where nothing resets.
void finish_sequences(const RecurrentBackward& f, const Run& run, int rank, int size) {
  const int64_t bytes = f.H * run.item;
  const auto hand_through = [&](void* to, const void* from, int64_t stride, int64_t b) {
    char* row = static_cast<char*>(to) + b * bytes;
    if (to && from)
      std::memcpy(row, static_cast<const char*>(from) + b * stride * run.item, size_t(bytes));
    else if (to)
      std::memset(row, 0, size_t(bytes));
  };
  const Span batch = share(f.rows.B, rank, size), steps = share(f.rows.T, rank, size);
  for (int64_t b = batch.begin; b < batch.end; b++) {
    if (run.lengths[b] > 0) continue;
    hand_through(f.dh0, f.dh_n, f.dh_n_b, b), hand_through(f.dc0, f.dc_n, f.dc_n_b, b);
  }
  zero_past_ends(f.dinput, f.rows, run.lengths, f.I * run.item, ended_steps(f.rows, run.lengths, rank, size));
  const int64_t all = f.rows.B * bytes;
  for (void* dreset : {f.dreset_h, f.dreset_c})
    if (dreset) std::memset(static_cast<char*>(dreset) + steps.begin * all, 0, size_t((steps.end - steps.begin) * all));
}

struct Line {
  int64_t l;
  void* dz;
};
Line line_at(const RecurrentBackward& f, const Run& run, int64_t l) {
  const int64_t chunk = (f.rows.reverse ? l : f.rows.lines - 1 - l) / run.lines;
  const int64_t row = (l - chunk_of(f.rows, run.lines, chunk, !f.rows.reverse).begin) * f.rows.rows;
  const int64_t bytes = run.kernels.format[run.dtype].pack_bytes;
  return {l, static_cast<char*>(f.dz[chunk % 2]) + row * f.ld_gates * bytes};
}

// The second half of a line, whose dz all ranks have written, and the first half of the line before: a unit needs
// nothing of others between the two.
void run_line(const RecurrentBackward& f, const Run& run, Line line, int rank, int size) {
  const RecurrentFormat& format = run.kernels.format[run.dtype];
  const int64_t units = tiles_of(f.H, 2 * format.lanes) * tiles_of(f.rows.rows, format.tile);
  const bool is_first = line.l == f.rows.first();
  const Line before = is_first ? line : line_at(f, run, f.rows.previous(line.l));
  const auto run_units = [&](Span some) {
    run.kernels.state_backward[run.dtype](f, line.l, line.dz, some);
    if (!is_first) run.kernels.cell[int(f.cell)].gates_backward[run.dtype](f, before.l, before.dz, some);
  };
  if (format.pack_bytes == 2) return run_units(share(units, rank, size));  // tiles take two units at once
  Deal deal(units, rank, size, run.steps, line.l % 2 != 0);
  for (int64_t u; (u = deal.next()) >= 0;) run_units({u, u + 1});
}

void run_lines(const RecurrentBackward& f, const Run& run, int rank, int size, Barrier& barrier) {
  const RecurrentKernels& kernels = run.kernels;
  const int dtype = run.dtype;
  const RecurrentFormat& format = kernels.format[dtype];
  const int64_t rows = f.rows.rows, panel = 2 * format.lanes;
  const int64_t units = tiles_of(f.H, panel) * tiles_of(rows, format.tile);
  kernels.pack_backward[dtype](f, share(tiles_of(f.H, panel) + (f.dinput ? tiles_of(f.I, panel) : 0), rank, size));
  kernels.start_backward[dtype](f, share(rows, rank, size));
  barrier.wait();
  const Line last = line_at(f, run, f.rows.last());
  kernels.cell[int(f.cell)].gates_backward[dtype](f, last.l, last.dz, share(units, rank, size));
  for (int64_t i = 0; i * run.lines < f.rows.lines; i++) {
    const Span chunk = chunk_of(f.rows, run.lines, i, !f.rows.reverse);
    for (int64_t s = 0; s < chunk.end - chunk.begin; s++) {
      barrier.wait();
      run_line(f, run, line_at(f, run, f.rows.reverse ? chunk.begin + s : chunk.end - 1 - s), rank, size);
    }
    run_products(f, run, chunk, f.dz[i % 2], rank, size, barrier);
  }
  barrier.wait();
  kernels.finish_backward[dtype](f, share(f.gate_rows(), rank, size));
}

// Without a step no sum is ever written.
void zero_sums(const RecurrentBackward& f, int64_t item) {
  const int64_t gates = f.gate_rows();
  const std::pair<void*, int64_t> all[] = {
      {f.dweight_ih, gates * f.I}, {f.dweight_hh, gates * f.H}, {f.dbias_ih, gates}, {f.dbias_hh, gates}};
  for (const auto& [data, count] : all)
    if (data) std::memset(data, 0, size_t(count * item));
}

}  // namespace

void run_recurrent(RecurrentBackward& f, const Lengths& lengths, bool reverse, DType type) {
  const int64_t item = item_size(type);
  const RecurrentKernels& kernels = kernels_for(f, type);
  const RecurrentFormat& format = kernels.format[int(type)];
  Scratch scratch;
  plan_rows(f.rows, lengths, reverse, format.row_tiles[int(f.cell)], scratch);
  if (f.rows.lines * f.rows.rows == 0) zero_sums(f, item);
  if (f.rows.B == 0 || f.H == 0) {
    if (f.dinput) std::memset(f.dinput, 0, size_t(f.rows.T * f.rows.B * f.I * item));
    return;
  }
  const int64_t rows = std::max<int64_t>(f.rows.rows, 1);
  const int64_t lines = std::clamp<int64_t>(format.chunk_rows / rows, 1, std::max<int64_t>(f.rows.lines, 1));
  const int ranks = ranks_for(f.cell, rows, f.H, tiles_of(f.H, 2 * format.lanes) * tiles_of(rows, format.tile));
  Run run{kernels, lengths, int(type), lines, item, nullptr, nullptr, nullptr, nullptr};
  for (uint64_t** left : {&run.steps, &run.inputs, &run.weights}) *left = take_deal(ranks, scratch);
  plan_backward(f, format, run, ranks, scratch);
  team(ranks, [&](int rank, int size, Barrier& barrier) {
    finish_sequences(f, run, rank, size);
    barrier.wait();  // the steps write what was zeroed
    if (f.rows.lines > 0) run_lines(f, run, rank, size, barrier);
  });
}

}  // namespace mk::cpu
