// The recurrent family, host side: what its files share. Never included by ISA-specific files.
#pragma once
#include <algorithm>
#include <vector>

#include "common/arena.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/recurrent.h"
#include "cpu/select.h"

namespace mk::cpu {

// The tensors of a call; those that a cell has not are undefined.
struct RecurrentInputs {
  InputView input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh;
  TensorView reset;
  InputView reset_h, reset_c;
  TensorView lengths;
};
struct RecurrentOutputs {
  TensorView output, h_n, c_n, cells, gates;
};
struct RecurrentUpstream {
  InputView doutput, dh_n, dc_n, dcells;
};
struct RecurrentGradients {
  TensorView dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, dreset_c;
};
struct RecurrentOptions {
  const char* op;
  Cell cell;
  bool relu, reverse;
};

// Of every sequence; all T without `lengths`.
using Lengths = std::vector<int64_t>;

// recurrent_schedule.cpp
Lengths lengths_of(const char* op, const TensorView& lengths, int64_t T, int64_t B);
void plan_rows(RecurrentRows& rows, const Lengths& lengths, bool reverse, int64_t row_tile, Scratch& scratch);
// The steps in which a rank has as many places past the ends as the others; and zeroing of those places, of `bytes`
// each.
Span ended_steps(const RecurrentRows& rows, const Lengths& lengths, int rank, int size);
void zero_past_ends(void* data, const RecurrentRows& rows, const Lengths& lengths, int64_t bytes, Span steps);
// recurrent_forward.cpp, recurrent_backward.cpp
void run_recurrent(RecurrentForward& f, const Lengths& lengths, bool reverse, DType type);
void run_recurrent(RecurrentBackward& f, const Lengths& lengths, bool reverse, DType type);

// Two calls are not for matrix units: splitting the weights costs more than it saves where large ones meet few steps,
// and where states are rounded before they are multiplied, relu would take 0 for units that are just above. The choice
// must not depend on B.
template <class Call>
const RecurrentKernels& kernels_for(const Call& f, DType type) {
  constexpr int64_t kSteps = 32, kFew = 3, kWeights = 1 << 16;
  const RecurrentKernels& best = select(recurrent_levels);
  const RecurrentFormat& format = best.format[int(type)];
  const bool large = kShapes[int(f.cell)].gates * f.H * f.I > kWeights, rounds = format.pack_bytes < format.sum_bytes;
  const bool vectors = format.product_bytes ? f.rows.T < (large ? kSteps : kFew) : f.relu && rounds;
  return vectors ? select(recurrent_levels, int(cpu_level()) - 1) : best;
}

inline Span share(int64_t n, int rank, int size) { return {n * rank / size, n * (rank + 1) / size}; }

inline uint64_t* take_deal(int ranks, Scratch& scratch) {
  uint64_t* left = scratch.take<uint64_t>(ranks * Deal::kWords);
  std::fill_n(left, ranks * Deal::kWords, 0);
  return left;
}

// A Deal of pieces that are some units long.
template <class Body>
void deal_pieces(int64_t units, int rank, int size, uint64_t* left, const Body& body) {
  constexpr int64_t kPieces = 16;  // of a rank: helpers wait little for the last one
  const int64_t pieces = std::min(units, size == 1 ? 1 : kPieces * size);
  Deal deal(pieces, rank, size, left);
  for (int64_t i; (i = deal.next(1)) >= 0;) body(share(units, int(i), int(pieces)));
}

// Ranks that pay: a barrier costs a few hundred nanoseconds, so a step must be longer than that by far.
inline int ranks_for(Cell cell, int64_t batch, int64_t hidden, int64_t units) {
  constexpr int64_t kStepFlops = 100000;
  const int64_t flops = 2 * kShapes[int(cell)].gates * batch * hidden * hidden;
  const int64_t ranks = std::min(units, flops / kStepFlops);
  return ranks <= 1 ? 1 : int(std::min<int64_t>(ranks, num_threads()));
}

// Lines of chunk i in running order, as a span.
inline Span chunk_of(const RecurrentRows& rows, int64_t lines, int64_t i, bool backwards) {
  const int64_t begin = i * lines, end = std::min(begin + lines, rows.lines);
  return backwards ? Span{rows.lines - end, rows.lines - begin} : Span{begin, end};
}

}  // namespace mk::cpu
