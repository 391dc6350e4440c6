// The recurrent family forward, host side: scratch, and the loop over chunks and lines that a team runs.
#include <cstring>

#include "cpu/recurrent_host.h"

namespace mk::cpu {
namespace {

void plan_forward(RecurrentForward& f, const RecurrentFormat& format, int64_t lines, int ranks, Scratch& scratch) {
  const CellShape& shape = kShapes[int(f.cell)];
  const int64_t panel = kPanelVectors * format.lanes, width = shape.vectors() * format.lanes, rows = f.rows.rows;
  f.k_input = round_up(f.I, format.k_multiple), f.k_hidden = round_up(f.H, format.k_multiple);
  f.ld_hidden = round_up(f.H, std::max<int64_t>(32, format.lanes * shape.units));
  // The last line's tiles may reach past the chunk.
  f.chunk = round_up(lines * rows, format.row_multiple) + (format.row_multiple > 1 ? format.row_multiple : 0);
  const int64_t hidden_rows = round_up(rows, format.row_multiple);
  const bool one_stride = !f.rows.slots && (f.rows.T == 1 || f.rows.B == 1 || f.input_t == f.rows.B * f.input_b);
  const bool whole = f.I % format.k_multiple == 0 && rows * lines % format.row_multiple == 0 &&
                     rows * f.rows.lines % format.row_multiple == 0;
  // Weights that stay in cache from step to step are worth more than their reuse within a chunk. The terms of z are
  // added in the same order either way.
  f.fused = f.panels * width * (f.k_input + f.k_hidden) * format.pack_bytes <= ranks * format.fused_bytes &&
            f.I % format.k_multiple == 0 && rows % format.row_multiple == 0 && !f.rows.slots && !f.known_output;
  f.ld_x = rows == 1 ? f.input_t : f.input_b;
  if (f.fused) {
    // The input is read where it lies.
  } else if (format.gather || !one_stride || !whole) {
    f.ld_x = f.k_input;
    f.x = scratch.take<char>(f.chunk * f.ld_x * format.operand_bytes());
  }
  f.packed_ih = scratch.take<char>(f.panels * f.k_input * width * format.operand_bytes());
  f.packed_hh = scratch.take<char>(f.panels * f.k_hidden * width * format.pack_bytes);
  f.bias = scratch.take<char>(f.panels * panel * format.sum_bytes);
  if (!f.fused) f.projected = scratch.take<char>(f.panels * f.chunk * panel * format.sum_bytes);
  if (f.known_output) {
    f.known = scratch.take<char>(f.chunk * f.ld_hidden * format.pack_bytes);
    f.z = scratch.take<char>(f.panels * f.chunk * panel * format.sum_bytes);
  }
  for (void*& hidden : f.hidden) hidden = scratch.take<char>(hidden_rows * f.ld_hidden * format.pack_bytes);
  if (shape.cell_state || shape.direct) f.carry = scratch.take<char>(rows * f.ld_hidden * format.sum_bytes);
}

// What the run of one rank needs besides the arguments.
struct Run {
  const RecurrentKernels& kernels;
  const Lengths& lengths;
  int dtype;
  int64_t lines, item;  // lines of a chunk, bytes of an element
  uint64_t* left;       // of a Deal
};

// Sequences without steps hand their state through; outputs past the ends are zero.
void finish_sequences(const RecurrentForward& f, const Run& run, int rank, int size) {
  const int64_t bytes = f.H * run.item;
  const auto hand_through = [&](void* to, const GivenState& from, int64_t b) {
    if (to)
      std::memcpy(static_cast<char*>(to) + b * bytes,
                  static_cast<const char*>(from.initial) + b * from.initial_b * run.item, size_t(bytes));
  };
  const Span batch = share(f.rows.B, rank, size), steps = ended_steps(f.rows, run.lengths, rank, size);
  for (int64_t b = batch.begin; b < batch.end; b++) {
    if (run.lengths[b] > 0) continue;
    hand_through(f.h_n, f.hidden0, b), hand_through(f.c_n, f.carry0, b);
  }
  zero_past_ends(f.output, f.rows, run.lengths, bytes, steps);
  zero_past_ends(f.cells, f.rows, run.lengths, bytes, steps);
  zero_past_ends(f.gates, f.rows, run.lengths, kShapes[int(f.cell)].saved * bytes, steps);
}

// Operands in parts are shared by many units (by_groups): those stay together.
void project(const RecurrentForward& f, const Run& run, Span lines, int64_t units, int rank, int size) {
  const auto kernel = run.kernels.cell[int(f.cell)].project[run.dtype];
  if (run.kernels.format[run.dtype].product_bytes) return kernel(f, lines, share(units, rank, size));
  deal_pieces(units, rank, size, run.left, [&](Span piece) { kernel(f, lines, piece); });
}

void run_lines(const RecurrentForward& f, const Run& run, int rank, int size, Barrier& barrier) {
  const RecurrentKernels& kernels = run.kernels;
  const CellKernels& cell = kernels.cell[int(f.cell)];
  const RecurrentFormat& format = kernels.format[run.dtype];
  const int64_t rows = f.rows.rows, dtype = run.dtype, row_tile = format.row_tiles[int(f.cell)];
  const int64_t vectors = f.panels * kShapes[int(f.cell)].vectors();
  const int64_t columns = format.product_vectors ? tiles_of(vectors, format.product_vectors) : f.panels;
  const int64_t step_units = f.panels * tiles_of(rows, row_tile);
  cell.pack[dtype](f, share(f.panels, rank, size));
  cell.start[dtype](f, share(rows, rank, size));
  int64_t parity = 0;
  for (int64_t i = 0; i * run.lines < f.rows.lines; i++) {
    const Span chunk = chunk_of(f.rows, run.lines, i, f.rows.reverse);
    const int64_t count = (chunk.end - chunk.begin) * rows;
    if (f.x) kernels.gather[dtype](f, chunk, share(count, rank, size));
    if (f.known) kernels.gather_known[dtype](f, chunk, share(count, rank, size));
    barrier.wait();
    if (f.known) {
      cell.recall[dtype](f, chunk, share(f.panels, rank, size));
      barrier.wait();
      continue;
    }
    if (!f.fused) {
      project(f, run, chunk, columns * tiles_of(count, format.product_rows(row_tile)), rank, size);
      barrier.wait();
    }
    for (int64_t s = 0; s < chunk.end - chunk.begin; s++, parity ^= 1) {
      const int64_t at = f.rows.reverse ? chunk.end - chunk.begin - 1 - s : s;
      cell.step[dtype](f, chunk.begin + at, at * rows, parity, {step_units, rank, size, run.left, parity != 0});
      barrier.wait();
    }
  }
}

}  // namespace

void run_recurrent(RecurrentForward& f, const Lengths& lengths, bool reverse, DType type) {
  if (f.rows.B == 0 || f.H == 0) return;
  const RecurrentKernels& kernels = kernels_for(f, type);
  const RecurrentFormat& format = kernels.format[int(type)];
  const CellShape& shape = kShapes[int(f.cell)];
  Scratch scratch;
  plan_rows(f.rows, lengths, reverse, format.row_tiles[int(f.cell)], scratch);
  f.panels = tiles_of(f.H, format.lanes * shape.units);
  // The input part of z for a chunk should stay in the L2 cache. Products on matrix units are so fast that reading the
  // weights again for every chunk costs more than that. No result depends on where chunks end.
  const int64_t projected_bytes = int64_t(format.matrix_units() ? 4 : 1) << 20;
  const int64_t row_bytes = f.panels * kPanelVectors * format.lanes * format.sum_bytes;
  // A known chunk is worked on panel by panel: it needs no room in the cache but for its operands.
  const int64_t rows =
      f.known_output ? (format.matrix_units() ? 512 : 256) : std::clamp<int64_t>(projected_bytes / row_bytes, 64, 512);
  const int64_t lines =
      std::clamp<int64_t>(rows / std::max<int64_t>(f.rows.rows, 1), 1, std::max<int64_t>(f.rows.lines, 1));
  const int64_t tiles = tiles_of(f.rows.rows, format.row_tiles[int(f.cell)]);
  const int ranks = f.known_output ? ranks_for(f.cell, f.rows.rows * lines, f.H, f.panels)
                                   : ranks_for(f.cell, f.rows.rows, f.H, f.panels * tiles);
  plan_forward(f, format, lines, ranks, scratch);
  const Run run{kernels, lengths, int(type), lines, item_size(type), take_deal(ranks, scratch)};
  team(ranks, [&](int rank, int size, Barrier& barrier) {
    finish_sequences(f, run, rank, size);
    if (f.rows.lines > 0) run_lines(f, run, rank, size, barrier);
  });
}

}  // namespace mk::cpu
