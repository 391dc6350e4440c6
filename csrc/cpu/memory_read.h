// Arguments and kernel table of memory_read; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor is contiguous.
struct MemoryReadArgs {
  const void *memory, *weights, *dread;  // [B, N, W], [B, R, N], [B, R, W]
  void *read, *dmemory, *dweights;       // contiguous; a gradient nobody needs is null
  int64_t batch, heads, rows, width;
  int64_t memory_b, memory_n, weights_b, weights_r, dread_b, dread_r;
};

// Elements of the accumulation type that a task needs beside its sums.
MK_INLINE int64_t read_scratch(const MemoryReadArgs& a) { return a.heads * (a.width + 64) + 64; }

struct MemoryReadKernels {
  // sums[r][w] = sum of weights[b][r][n] memory[b][n][w] over rows [begin, end); sums are of the accumulation type.
  void (*sum[kFloatTypes])(const MemoryReadArgs&, int64_t b, int64_t begin, int64_t end, void* sums, void* scratch);
  // read[b] = the sums of `chunks` chunks, added in order and rounded once.
  void (*combine[kFloatTypes])(const MemoryReadArgs&, int64_t b, const void* sums, int64_t chunks);
  // dmemory and dweights of rows [begin, end) of entry b.
  void (*backward[kFloatTypes])(const MemoryReadArgs&, int64_t b, int64_t begin, int64_t end, void* scratch);
};

MK_KERNELS(MemoryReadKernels, memory_read)

}  // namespace mk::cpu
