// Arguments and kernel table of dnc_sequence; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

enum class DncCosine : int { roots, roots_and_product, product };

// Contiguous but for input and memory, whose last dimension is; S is the type of the call, A the accumulation type.
struct DncArgs {
  int64_t steps, batch, features, hidden, rows, width, readers, writers;
  bool controlled, key_mask, sharpen_links, deallocate, write_gradient, oneplus, bounded;
  DncCosine cosine;
  double clip;
  // S: [T, B, I], [B, N, W], then the rest of the state, the controller's and its weights as the op takes them.
  const void *input, *memory, *usage, *link, *precedence, *write_weights, *read_weights, *reads, *h, *c, *weight_ih,
      *weight_rh, *weight_hh, *bias, *weight_interface, *bias_interface;
  int64_t input_t, input_b, memory_b, memory_n;
  void *all_reads, *all_hidden, *last_memory, *last_usage, *last_link, *last_precedence, *last_cell;  // S
  void *weights, *asked, *usages, *precedences, *followed, *entered, *gates, *cells;  // A: the saved outputs
  // S, dweights A; null: did not arrive.
  const void *dreads, *dhidden, *dlast_memory, *dlast_usage, *dlast_link, *dlast_precedence, *dweights, *dcell;
  // S; a gradient nobody needs is null.
  void *dinput, *dmemory, *dusage, *dlink, *dprecedence, *dwrite_weights, *dread_weights, *dreads0, *dh, *dc;
  void *dweight[6];  // from weight_ih to bias_interface
  // A: weights as two matrices, in the layout that the products of a direction want; gradients before the activations.
  void *controller, *projection, *controller_bias, *projection_bias, *dgates, *dasked;
  int64_t tile, segment;  // batch rows that go through a step together; steps between two checkpoints

  MK_INLINE int64_t every() const { return readers + writers; }
  MK_INLINE int64_t read() const { return readers * width; }
  MK_INLINE int64_t depth() const { return features + read() + hidden; }  // of the controller's product
  MK_INLINE int64_t asks() const {                                        // elements of an interface vector
    const int64_t keys = (readers + 3 * writers) * width, scalars = 2 * readers + 3 * writers;
    return keys + scalars + readers * (2 * writers + 1) + (key_mask ? every() * width : 0) +
           (sharpen_links ? 2 * readers : 0);
  }
  MK_INLINE int64_t padded_rows() const { return (rows + 15) / 16 * 16; }
  MK_INLINE int64_t segments() const { return (steps + segment - 1) / segment; }
};

struct DncKernels {
  int64_t (*scratch[kFloatTypes])(const DncArgs &, bool backward);  // bytes that a tile needs
  void (*pack[kFloatTypes])(const DncArgs &, bool backward);
  void (*forward[kFloatTypes])(const DncArgs &, int64_t first, int64_t count, void *scratch);
  void (*backward[kFloatTypes])(const DncArgs &, int64_t first, int64_t count, void *scratch);
  // Gradients of weights: rows [begin, end) of the controller's matrix and then of the interface's one.
  void (*weights[kFloatTypes])(const DncArgs &, int64_t begin, int64_t end, void *scratch);
};

MK_KERNELS(DncKernels, dnc_sequence)

}  // namespace mk::cpu
