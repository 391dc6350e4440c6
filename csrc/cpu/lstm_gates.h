// Arguments and kernel table of lstm_gates; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Element strides; the last dimension of every tensor is contiguous.
struct LstmGatesArgs {
  int64_t batch, hidden;
  const void *gates, *cell, *peephole;  // [B, 4H], [B, H], [3, H] or null
  int64_t gates_b, cell_b, peephole_r;
  void *h, *c;          // contiguous
  const void *dh, *dc;  // null: absent
  int64_t dh_b, dc_b;
  void *dgates, *dcell, *dpeephole;  // contiguous; a gradient nobody needs is null
};

struct LstmGatesKernels {
  void (*forward[kFloatTypes])(const LstmGatesArgs &, int64_t row, int64_t end);
  // Rows [row, row_end) of columns [column, column_end); dpeephole, when asked for, needs all rows at once.
  void (*backward[kFloatTypes])(const LstmGatesArgs &, int64_t row, int64_t row_end, int64_t column,
                                int64_t column_end);
};

MK_KERNELS(LstmGatesKernels, lstm_gates)

}  // namespace mk::cpu
