// Arguments and kernel table of usage; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor is contiguous.
struct UsageArgs {
  const void *usage, *write, *read, *free, *dout;  // [B, N], [B, H, N], [B, R, N], [B, R], [B, N]
  void *out, *dusage, *dwrite, *dread, *dfree;     // contiguous; a gradient nobody needs is null
  int64_t rows, write_heads, read_heads;
  int64_t usage_b, write_b, write_h, read_b, read_r, free_b, dout_b;
};

// Elements of the accumulation type that backward needs: factors and prefix products of the heads, sums for dfree.
MK_INLINE int64_t usage_scratch(const UsageArgs& a) { return 16 * (2 * a.write_heads + 3 * a.read_heads); }

struct UsageKernels {
  void (*forward[kFloatTypes])(const UsageArgs&, int64_t b);
  void (*backward[kFloatTypes])(const UsageArgs&, int64_t b, void* scratch);
};

MK_KERNELS(UsageKernels, usage)

}  // namespace mk::cpu
