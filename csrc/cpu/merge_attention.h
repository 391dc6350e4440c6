// Arguments and kernel table of merge_attention; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides of the dimensions s, b, h, q; the last dimension of outs and dout is contiguous. lses, lse and dlse
// are of the accumulation type.
struct MergeArgs {
  int64_t parts, heads, queries, width, rows;  // rows = B NH Q
  const void *outs, *lses, *dout, *dlse;       // dout, dlse null: absent
  int64_t outs_stride[4], lses_stride[4], dout_stride[3], dlse_stride[3];
  void *out, *lse;      // contiguous
  void *douts, *dlses;  // contiguous; a gradient nobody needs is null
};

// Rows of a task's block, and what it needs of scratch: weights, then dot products of upstream gradients and outs.
constexpr int64_t kMergeRows = 64;
MK_INLINE int64_t merge_scratch(int64_t parts) { return (2 * parts + 2) * kMergeRows; }

struct MergeKernels {
  void (*forward[kFloatTypes])(const MergeArgs &, int64_t begin, int64_t end, void *scratch);
  void (*backward[kFloatTypes])(const MergeArgs &, int64_t begin, int64_t end, void *scratch);
};

MK_KERNELS(MergeKernels, merge_attention)

}  // namespace mk::cpu
