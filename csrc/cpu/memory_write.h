// Arguments and kernel table of memory_write; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor is contiguous.
struct MemoryWriteArgs {
  const void *memory, *weights, *erase, *add, *dwritten;  // [B, N, W], [B, H, N], [B, H, W] twice, [B, N, W]
  void* written;                                          // [B, N, W], any outer strides; may be the memory itself
  void *dmemory, *dweights, *derase, *dadd;               // contiguous; a gradient nobody needs is null
  int64_t batch, heads, rows, width;
  int64_t memory_b, memory_n, weights_b, weights_h, erase_b, erase_h, add_b, add_h, dwritten_b, dwritten_n, written_b,
      written_n;
};

// Rows of a tile, and the elements of the accumulation type that a backward task needs beside its partial.
constexpr int64_t kWriteTile = 32;
MK_INLINE int64_t write_scratch(const MemoryWriteArgs& a) {
  return a.heads * (2 * a.width + 64 + kWriteTile * 17 + 64);
}

struct MemoryWriteKernels {
  void (*forward[kFloatTypes])(const MemoryWriteArgs&, int64_t b, int64_t begin, int64_t end, void* scratch);
  // dmemory and dweights of rows [begin, end); their sums for derase and dadd go to partial, [2][H][W] of the
  // accumulation type.
  void (*backward[kFloatTypes])(const MemoryWriteArgs&, int64_t b, int64_t begin, int64_t end, void* partial,
                                void* scratch);
  void (*combine[kFloatTypes])(const MemoryWriteArgs&, int64_t b, const void* partials, int64_t chunks);
};

MK_KERNELS(MemoryWriteKernels, memory_write)

}  // namespace mk::cpu
