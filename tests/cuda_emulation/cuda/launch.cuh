// Stands in for csrc/cuda/launch.cuh: runs every block of the grid, one after the other.
#pragma once
#include <cuda_runtime.h>

namespace mk::cuda {

template <class... Formal, class... Actual>
cudaError_t launch(void (*kernel)(Formal...), dim3 grid, dim3 block, cudaStream_t, Actual... arguments) {
  gridDim = grid, blockDim = block;
  emulation::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        emulation::run_block(block.x * block.y * block.z);
      }
  return cudaSuccess;
}

}  // namespace mk::cuda
