// lstm: what the host side (cpu/lstm.cpp) and the kernels of a level share.
//
//   z = x[t] W_ih^T + b + h' W_hh^T;  c = sigmoid(f) c' + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
//
// Weights are packed once a call, in panels of `lanes` hidden units with their four gates side by side, so that one
// register tile holds whole cells. Time runs in chunks: the input part of z for a chunk is one matrix product into
// cache-sized scratch, then the steps add the recurrent part. All ranks of a team run every step; a rank owns (panel,
// row tile) units and keeps them. Element types: T of the tensors, P of packed operands, A of sums (P = A = float or
// double, but P = bfloat16 on AMX tiles).
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

struct LstmFormat {
  int64_t lanes, pack_bytes, sum_bytes;
  int64_t k_multiple;      // packed operands are zero-filled to a multiple of this along the summed dimension
  int64_t chunk_rows;      // rows (t, b) of a backward chunk, about
  int64_t row_tile, tile;  // rows of a unit at most: forward, backward
  int64_t gate_tile;       // rows of W of a weight gradient unit at most
  int64_t row_multiple;    // rows that an operand must have in memory: operand tiles are loaded whole
  bool gather;             // the input is always copied into operand form
  int64_t fused_bytes;     // packed weights of a rank up to which a step takes the input part of z along
};

struct Span {
  int64_t begin, end;
};

// Which rows are alive at a step, and where states start and end.
struct LstmRows {
  int64_t T, B;
  bool reverse;
  const uint8_t* reset;
  int64_t reset_t, reset_b;
  const int64_t* lengths;
  int64_t lengths_b;

  MK_INLINE int64_t length(int64_t b) const { return lengths ? lengths[b * lengths_b] : T; }
  MK_INLINE bool active(int64_t t, int64_t b) const { return t < length(b); }
  MK_INLINE bool resets(int64_t t, int64_t b) const { return reset && reset[t * reset_t + b * reset_b]; }
  MK_INLINE int64_t first(int64_t b) const { return reverse ? length(b) - 1 : 0; }
  MK_INLINE int64_t last(int64_t b) const { return reverse ? 0 : length(b) - 1; }
  MK_INLINE int64_t next(int64_t t) const { return reverse ? t - 1 : t + 1; }
  MK_INLINE int64_t previous(int64_t t) const { return reverse ? t + 1 : t - 1; }
};

struct LstmForward {
  LstmRows rows;
  int64_t I, H;
  const void *input, *h0, *c0, *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  int64_t input_t, input_b, h0_b, c0_b, weight_ih_n, weight_hh_n;
  void *output, *h_n, *c_n, *cells, *gates;  // contiguous; cells and gates may be null

  int64_t panels, k_input, k_hidden, ld_x, ld_hidden, chunk;  // chunk: rows that `projected` holds for a panel
  void *packed_ih, *packed_hh;                                // P [panels][k][4 lanes]
  void *bias, *projected;                                     // A [panels][4 lanes], A [panels][chunk][4 lanes]
  void* x;          // P [chunk][ld_x], or null: the input itself is the operand
  void* hidden[2];  // P [B][ld_hidden]: state entering a step, even and odd steps
  void* carry;      // A [B][ld_hidden]: c entering the next step
  bool fused;       // a step adds the input part of z itself: neither `projected` nor `x` is used
};

struct LstmBackward {
  LstmRows rows;
  int64_t I, H;
  const void *input, *h0, *c0, *weight_ih, *weight_hh, *output, *cells, *gates;
  int64_t input_t, input_b, h0_b, c0_b, weight_ih_n, weight_hh_n;
  const void *doutput, *dh_n, *dc_n, *dcells;  // null: absent
  int64_t doutput_t, doutput_b, dh_n_b, dc_n_b, dcells_t, dcells_b;
  void *dinput, *dh0, *dc0, *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;  // contiguous; null: not needed

  int64_t k_gates, ld_gates, ld_hidden, chunk;  // chunk: rows of a dz buffer
  void *packed_ih, *packed_hh;                  // P [panels][k_gates][2 lanes]
  void* dz[2];                                  // P [chunk][ld_gates], even and odd chunks
  void *dh, *dc;                                // A [B][ld_hidden]: gradients that flow to the step before
  void *sum_ih, *sum_hh, *sum_bias;  // A [4H][I], [4H][H], [4H]: of the chunks so far; the outputs themselves if T is A
  // P, where the kernels have `arrange`: dz of a chunk as left operand of the weight gradients, and [panels][chunk][2
  // lanes], x and hidden states as right operand.
  void *transposed, *operand;
  MK_INLINE bool first_chunk(Span steps) const { return rows.reverse ? steps.begin == 0 : steps.end == rows.T; }
};

struct LstmKernels {
  LstmFormat format[kFloatTypes];
  void (*pack[kFloatTypes])(const LstmForward&, Span panels);
  void (*start[kFloatTypes])(const LstmForward&, Span rows);
  void (*gather[kFloatTypes])(const LstmForward&, Span steps, Span rows);
  void (*project[kFloatTypes])(const LstmForward&, Span steps, Span units);
  void (*step[kFloatTypes])(const LstmForward&, int64_t t, int64_t row, int64_t parity, Span units);

  void (*pack_backward[kFloatTypes])(const LstmBackward&, Span panels);  // those of weight_hh, then those of weight_ih
  void (*start_backward[kFloatTypes])(const LstmBackward&, Span rows);
  void (*gates_backward[kFloatTypes])(const LstmBackward&, int64_t t, void* dz, Span units);  // dz of step t
  void (*state_backward[kFloatTypes])(const LstmBackward&, int64_t t, const void* dz, Span units);
  // Brings the operands of the weight gradients into order; null: not needed.
  void (*arrange[kFloatTypes])(const LstmBackward&, Span steps, const void* dz, void* scratch, Span units);
  void (*input_backward[kFloatTypes])(const LstmBackward&, Span steps, const void* dz, Span units);
  void (*bias_backward[kFloatTypes])(const LstmBackward&, Span steps, const void* dz, Span columns);
  void (*weight_backward[kFloatTypes])(const LstmBackward&, Span steps, const void* dz, void* scratch, Span units);
  void (*finish_backward[kFloatTypes])(const LstmBackward&, Span rows, Span gates);
};
MK_KERNELS_AMX(LstmKernels, lstm)

// Row tiles of nearly equal size, none above `most`.
MK_INLINE int64_t tiles_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
MK_INLINE Span tile_of(int64_t rows, int64_t tiles, int64_t i) { return {rows * i / tiles, rows * (i + 1) / tiles}; }
MK_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
MK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace mk::cpu
