// The only place with launch syntax, so that the kernels also compile as plain C++ under the test emulator.
#pragma once
#include <cuda_runtime.h>

namespace mk::cuda {

template <class... Formal, class... Actual>
cudaError_t launch(void (*kernel)(Formal...), dim3 grid, dim3 block, cudaStream_t stream, Actual... arguments) {
  kernel<<<grid, block, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mk::cuda
