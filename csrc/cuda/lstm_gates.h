// Launchers of lstm_gates. The last dimension of every tensor is contiguous; outputs and gradients are contiguous
// throughout.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"

namespace mk::cuda {

struct LstmGatesArgs {
  const void *gates, *cell, *peephole;  // peephole may be null
  void *h, *c;
  int64_t batch, hidden, gates_stride, cell_stride, peephole_stride;
};
cudaError_t lstm_gates(const LstmGatesArgs &args, DType dtype, cudaStream_t stream);

struct LstmGatesBackwardArgs {
  const void *gates, *cell, *peephole, *dh, *dc;  // peephole, dh, dc may be null
  void *dgates, *dcell, *dpeephole;               // each may be null
  void *scratch;                                  // lstm_gates_scratch accumulators, when dpeephole is wanted
  int64_t batch, hidden, gates_stride, cell_stride, peephole_stride, dh_stride, dc_stride;
};
cudaError_t lstm_gates_backward(const LstmGatesBackwardArgs &args, DType dtype, cudaStream_t stream);
int64_t lstm_gates_scratch(int64_t batch, int64_t hidden);

}  // namespace mk::cuda
