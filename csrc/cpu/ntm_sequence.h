// Arguments and kernel table of ntm_sequence; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Contiguous but for input and memory, whose last dimension is; S is the type of the call, A the accumulation type.
struct NtmArgs {
  int64_t steps, batch, features, hidden, rows, width, readers, writers, scalars;
  bool graves;
  // S: [T, B, I], [B, N, W], then the rest of the state and the weights as the op takes them.
  const void *input, *memory, *read_weights, *write_weights, *reads, *h, *c, *weight_ih, *weight_rh, *weight_hh, *bias,
      *read_key, *read_scalars, *write_key, *write_scalars, *write_vectors;
  int64_t input_t, input_b, memory_b, memory_n;
  void *all_hidden, *all_reads, *last_memory, *last_cell;          // S
  void *weights, *entered, *gates, *cells, *heads;                 // A: the saved outputs of the op
  const void *dhidden, *dreads, *dlast_memory, *dweights, *dcell;  // S, dweights A; null: did not arrive
  // S; a gradient nobody needs is null.
  void *dinput, *dmemory, *dread_weights, *dwrite_weights, *dreads0, *dh, *dc;
  void *dweight[9];  // from weight_ih to write_vectors
  // A: weights as two matrices, in the layout that the products of a direction want; gradients before the activations.
  void *controller, *projection, *controller_bias, *projection_bias, *dgates, *dheads;

  double clip = __builtin_inf();  // the cell of an NTM is not clamped

  MK_INLINE bool reads_written() const { return graves; }
  MK_INLINE int64_t every() const { return readers + writers; }
  MK_INLINE int64_t read() const { return readers * width; }
  MK_INLINE int64_t depth() const { return features + read() + hidden; }  // of the controller's product
  // Of a row of `heads`: keys, scalars, erase, add; then two stats of location_address a head.
  MK_INLINE int64_t projected() const { return every() * (width + scalars) + 2 * writers * width; }
  MK_INLINE int64_t head_row() const { return projected() + 2 * every(); }
  MK_INLINE int64_t padded_rows() const { return (rows + 15) / 16 * 16; }
  MK_INLINE int64_t padded(int64_t n) const { return (n + 31) / 16 * 16; }
};

constexpr int64_t kNtmTile = 8;  // batch rows that go through a step together, so that weights are read once for them

// Memories kept by backward: one a segment of about sqrt(T) steps, and those within a segment.
MK_INLINE int64_t ntm_segment(int64_t steps) {
  int64_t n = 1;
  while (n * n < steps) n++;
  return n;
}

struct NtmKernels {
  int64_t (*scratch)(const NtmArgs &, bool backward);  // elements of A that a tile needs
  void (*pack[kFloatTypes])(const NtmArgs &, bool backward);
  void (*forward[kFloatTypes])(const NtmArgs &, int64_t first, int64_t count, void *scratch);
  void (*backward[kFloatTypes])(const NtmArgs &, int64_t first, int64_t count, void *scratch);
  // Gradients of weights: rows [begin, end) of the controller's matrix and then of the heads' one.
  void (*weights[kFloatTypes])(const NtmArgs &, int64_t begin, int64_t end, void *scratch);
};

MK_KERNELS(NtmKernels, ntm_sequence)

}  // namespace mk::cpu
