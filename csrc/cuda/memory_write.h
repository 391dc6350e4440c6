// Launchers of memory_write. memory, erase, add and dwritten are contiguous in the last dimension; outputs and
// gradients throughout.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"

namespace mk::cuda {

struct MemoryWriteArgs {
  const void *memory, *weights, *erase, *add;
  int64_t batch, rows, width, heads;
  int64_t memory_stride_b, memory_stride_n, weights_stride_b, weights_stride_h, weights_stride_n;
  int64_t erase_stride_b, erase_stride_h, add_stride_b, add_stride_h;
};
cudaError_t memory_write(const MemoryWriteArgs& args, void* written, DType dtype, cudaStream_t stream);

struct MemoryWriteGradients {
  const void* dwritten;
  int64_t dwritten_stride_b, dwritten_stride_n;
  void *dmemory, *dweights, *derase, *dadd;  // each may be null
  void* scratch;                             // memory_write_scratch accumulators, when derase or dadd is wanted
};
cudaError_t memory_write_backward(const MemoryWriteArgs& args, const MemoryWriteGradients& gradients, DType dtype,
                                  cudaStream_t stream);
int64_t memory_write_scratch(int64_t batch, int64_t rows, int64_t width, int64_t heads);

}  // namespace mk::cuda
