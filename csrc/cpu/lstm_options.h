// lstm with peepholes, layer norm, zoneout, recurrent dropout, an output gate that sees the cell, projection, heads and
// states to reset to: what the host side (cpu/lstm_options*.cpp) and the kernels of a level share.
//
// These options need whole rows of a step, so a step has phases, with a barrier of the team between them: products over
// all rows, whose units are (panel of columns, row tile), and row phases, whose units are rows. Layouts are the user's
// (row-major, gates i, f, g, o side by side). All of it in the accumulation type A, whatever the tensors' type T.
#pragma once
#include "cpu/recurrent.h"

namespace mk::cpu {

// c[rows][segments * width] = a w. Columns come in segments (of one gate of one head) that each see part of a row of a:
// `parts` runs of `depth`, run p of segment s from p * part_step + s % period * segment_step on.
struct Product {
  int64_t segments, width, parts, depth, part_step, segment_step, period;
  bool used;
  const void* weight;                                                // T
  int64_t column_stride, depth_stride, segment_stride, part_stride;  // of its elements, in the same terms
  void* packed;                                                      // A [segments][panels][parts * depth][2 lanes]
};

// sum[n][k] (+)= sum over rows of left[row][n] right[row][offset + k]; rows n come in gates x heads segments of `rows`,
// and head q has its own `width` columns of right.
struct WeightSum {
  int64_t gates, heads, rows, width;
  const void *left, *right;
  int64_t ld_left, ld_right;
  void* sum;  // A; null: not needed
};

// total[j] (+)= sum over rows of a[row][j] b[row][j]; b may be null: of a alone.
struct ColumnSum {
  const void *a, *b;
  int64_t lda, ldb, width;
  void* total;
};

// Which rows are alive at a step, and where states start and end.
struct SteppedRows {
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

struct LstmOptions {
  SteppedRows rows;
  int64_t I, H, P, heads;
  const void *input, *h0, *c0, *reset_h, *reset_c;
  int64_t input_t, input_b, h0_b, c0_b, reset_h_t, reset_h_b, reset_c_t, reset_c_b;
  const void *bias_ih, *bias_hh, *raw_peephole, *raw_gamma, *raw_beta;  // T, may be null
  int64_t raw_peephole_p;                                               // stride of its rows
  double zoneout_h, zoneout_c, dropout;
  bool expected;  // zoneout by its expectation
  uint64_t seed;
  void *bias, *peephole, *gamma, *beta;  // A [4H], [3H], [9H], [9H]; null: absent
  void* mask;                            // A [B][ld_p]: recurrent dropout; null: none
  void* room;                            // A [B][ld_room]: for the lots that a row draws
  Product input_to_gates, hidden_to_gates, cell_to_output, project;
  int64_t ld_x, ld_p, ld_h, ld_z, ld_room, chunk;  // leading sizes of rows of I, P, H, 4H numbers; rows of a chunk
  MK_INLINE bool cell_gate() const { return cell_to_output.used; }
  MK_INLINE bool projects() const { return project.used; }
  MK_INLINE int64_t input_gates() const { return cell_gate() ? 3 * H : 4 * H; }  // that see the input
};

struct LstmOptionsForward : LstmOptions {
  void *output, *h_n, *c_n, *cells, *gates;  // contiguous; cells and gates may be null
  void *x, *projected;                       // A [chunk][ld_x], [chunk][ld_z]
  void *hidden, *operand, *carry;            // A [B][..]: h, h under its mask, c that enter the step
  void *z, *c_new, *from_cell, *q, *h_new;   // A [B][..] of the step
  // With the output known, only cells and gates are wanted: z holds the rows of a chunk, `operand` too, q is null.
  const void* known_output;
};

struct LstmOptionsBackward : LstmOptions {
  const void *output, *cells, *gates, *doutput, *dh_n, *dc_n, *dcells;
  int64_t doutput_t, doutput_b, dh_n_b, dc_n_b, dcells_t, dcells_b;
  void *dinput, *dh0, *dc0, *dreset_h, *dreset_c;  // T, contiguous; null: not needed
  Product gates_to_input, gates_to_hidden, output_to_cell, unproject;
  // A, of the rows of a chunk: what enters and what can be known before the steps ...
  void *x, *operand, *c_old, *c_new, *tanh_c, *q, *normal_x, *normal_h, *normal_c, *scale_x, *scale_h, *scale_c;
  // ... and the gradients of the gates, of the products they are made of, of tanh's argument, of h before projection.
  void *dz, *dz_hidden, *dz_input, *dy, *dh_new;
  void *dh, *dc, *dq, *dc_new, *dc_output, *dproduct;  // A [B][..]: of the step
  MK_INLINE bool first_chunk(Span steps) const { return rows.reverse ? steps.begin == 0 : steps.end == rows.T; }
};

struct LstmOptionsKernels {
  int64_t lanes[kFloatTypes];     // of A
  int64_t row_tile[kFloatTypes];  // rows of a unit of a product at most
  void (*pack[kFloatTypes])(const Product&, Span panels);
  void (*product[kFloatTypes])(const Product&, const void* a, int64_t lda, int64_t rows, void* c, int64_t ldc,
                               Span units);
  void (*weight_sum[kFloatTypes])(const WeightSum&, int64_t rows, bool fresh, void* panel, Span units);
  void (*column_sum[kFloatTypes])(const ColumnSum&, int64_t rows, bool fresh, Span columns);
  void (*round[kFloatTypes])(const void* from, void* to, int64_t begin, int64_t end);

  void (*prepare[kFloatTypes])(const LstmOptions&);  // bias, peephole, gamma, beta
  void (*draw[kFloatTypes])(const LstmOptions&, Span rows);
  void (*gather_input[kFloatTypes])(const LstmOptions&, void* x, Span steps, Span rows);
  void (*gather_hidden[kFloatTypes])(const LstmOptions&, const void* output, void* operand, Span steps, Span rows);
  void (*start[kFloatTypes])(const LstmOptionsForward&, Span rows);
  void (*finish_input[kFloatTypes])(const LstmOptions&, void* projected, Span rows);
  void (*gates[kFloatTypes])(const LstmOptionsForward&, int64_t t, int64_t row, Span rows);
  void (*outputs[kFloatTypes])(const LstmOptionsForward&, int64_t t, int64_t row, Span rows);
  void (*states[kFloatTypes])(const LstmOptionsForward&, int64_t t, Span rows);

  void (*start_backward[kFloatTypes])(const LstmOptionsBackward&, Span rows);
  void (*recall[kFloatTypes])(const LstmOptionsBackward&, Span steps, Span rows);
  void (*normalise[kFloatTypes])(const LstmOptionsBackward&, Span rows);
  void (*arrive[kFloatTypes])(const LstmOptionsBackward&, int64_t t, Span rows);
  void (*states_backward[kFloatTypes])(const LstmOptionsBackward&, int64_t t, int64_t row, Span rows);
  void (*outputs_backward[kFloatTypes])(const LstmOptionsBackward&, int64_t t, int64_t row, Span rows);
  void (*gates_backward[kFloatTypes])(const LstmOptionsBackward&, int64_t t, int64_t row, Span rows);
  void (*finish_input_backward[kFloatTypes])(const LstmOptionsBackward&, Span rows);
  void (*store_input[kFloatTypes])(const LstmOptionsBackward&, Span steps, const void* from, Span rows);
};
MK_KERNELS(LstmOptionsKernels, lstm_options)

MK_INLINE int64_t panels_of(const Product& p, int64_t lanes) { return p.segments * tiles_of(p.width, 2 * lanes); }

}  // namespace mk::cpu
