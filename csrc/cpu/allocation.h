// Arguments and kernel table of allocation; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

struct AllocationArgs {
  const void *usage, *gates, *dout;  // [B, N], [B, H] or null, [B, H, N]; inner dimensions contiguous
  void *out, *dusage, *dgates;       // contiguous; a gradient nobody needs is null
  int64_t rows, heads;               // heads: 1 without gates
  int64_t usage_b, gates_b, dout_b, dout_h;
  double eps;
};

// Bytes of scratch. Sorting: a key and an index of every row, twice; beside that vectors of N accumulators: forward the
// usage and an allocation, backward usage, order and allocation of every head, the gradient of usage and the products.
MK_INLINE int64_t allocation_vector(const AllocationArgs& a) { return (a.rows + 15) / 16 * 16; }
MK_INLINE int64_t sort_scratch(const AllocationArgs& a, int64_t size) { return 2 * allocation_vector(a) * (size + 4); }
MK_INLINE int64_t allocation_scratch(const AllocationArgs& a, int64_t size, bool backward) {
  const int64_t vectors = backward ? 2 * a.heads + 2 : 2, orders = backward ? a.heads : 0;
  return sort_scratch(a, size) + allocation_vector(a) * (size * vectors + 4 * orders);
}

struct AllocationKernels {
  void (*forward[kFloatTypes])(const AllocationArgs&, int64_t b, void* scratch);
  void (*backward[kFloatTypes])(const AllocationArgs&, int64_t b, void* scratch);
};

MK_KERNELS(AllocationKernels, allocation)

}  // namespace mk::cpu
