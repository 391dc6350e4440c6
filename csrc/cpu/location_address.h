// Arguments and kernel table of location_address; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor but gate and sharpen is contiguous.
struct LocationAddressArgs {
  const void *content, *previous, *gate, *shift, *sharpen,
      *dweights;          // [B, R, N] twice, [B, R], [B, R, taps], [B, R], [B, R, N]
  void *weights, *stats;  // contiguous; stats [B, R, 2] in the accumulation type; weights as given to backward too
  void *dcontent, *dprevious, *dgate, *dshift, *dsharpen;  // contiguous; a gradient nobody needs is null
  double floor;  // added to the sum of powers that the weights are shares of; 0: they sum to 1
  int64_t batch, heads, rows, taps;
  int64_t content_b, content_r, previous_b, previous_r, gate_b, gate_r, shift_b, shift_r, sharpen_b, sharpen_r,
      dweights_b, dweights_r;
};

// A row in scratch: `taps` / 2 on either side of `rows`, moved so that the first of these starts a line of the cache,
// and room for a whole vector after it.
MK_INLINE int64_t location_row(int64_t rows, int64_t taps) { return (rows + taps + 47) / 16 * 16; }

// Elements of the accumulation type that a task needs: the circle of interpolated weights, that of their gradients, the
// shifted weights and a function of them, the taps and their gradients.
MK_INLINE int64_t location_scratch(int64_t rows, int64_t taps) {
  return 4 * location_row(rows, taps) + 2 * location_row(0, taps) + 16;
}

struct LocationAddressKernels {
  void (*forward[kFloatTypes])(const LocationAddressArgs &, int64_t b, int64_t r, void *scratch);
  void (*backward[kFloatTypes])(const LocationAddressArgs &, int64_t b, int64_t r, void *scratch);
};

MK_KERNELS(LocationAddressKernels, location_address)

}  // namespace mk::cpu
