// Arguments and kernel table of gru_gates; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor is contiguous.
struct GruGatesArgs {
  int64_t batch, hidden;
  const void *gates_input, *gates_hidden, *state;  // [B, 3H], [B, 3H], [B, H]
  int64_t gates_input_b, gates_hidden_b, state_b;
  void *h;         // contiguous
  const void *dh;  // gradient of h
  int64_t dh_b;
  void *dgates_input, *dgates_hidden, *dstate;  // contiguous; a gradient nobody needs is null
};

struct GruGatesKernels {
  void (*forward[kFloatTypes])(const GruGatesArgs &, int64_t row, int64_t end);
  void (*backward[kFloatTypes])(const GruGatesArgs &, int64_t row, int64_t end);
};

MK_KERNELS(GruGatesKernels, gru_gates)

}  // namespace mk::cpu
