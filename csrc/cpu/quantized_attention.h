// Arguments and kernel table of quantized_attention; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// A tensor "B heads rows width" by its element strides; the last dimension is contiguous.
struct QuantizedTensor {
  const void* data;
  int64_t b, h, row;
};

struct QuantizedAttentionArgs {
  QuantizedTensor query, key, value, dout, dlse;
  QuantizedTensor key_scale, value_scale;  // "B heads K": the rows of these are the keys, row stride 1
  const int64_t* lengths;                  // null: all keys
  int64_t lengths_b;
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  double scale;
  void *out, *lse, *stats, *total;  // written by forward, the last two read by backward; contiguous
  void* dquery;

  // The keys are split into `splits` runs of split_keys. `partial`, of the accumulation type: in forward
  // [split][B NH Q][value_width + 2] (sums, base, sum of powers), in backward [split][B NH Q][width].
  int64_t splits, split_keys;
  void* partial;
};

// Rows [begin, end) of the queries that read key head h of entry b: row r is query r % Q of head h * (NH / NHk) + r /
// Q.
struct QuantizedPart {
  int64_t b, h, begin, end, split;
};

struct QuantizedAttentionKernels {
  int64_t (*scratch[kFloatTypes])(const QuantizedAttentionArgs&);  // bytes that a task needs
  void (*forward[kFloatTypes])(const QuantizedAttentionArgs&, const QuantizedPart&, void* scratch);
  void (*backward[kFloatTypes])(const QuantizedAttentionArgs&, const QuantizedPart&, void* scratch);
  // Rows [begin, end) of [B][NH][Q] from their parts, joined in the order of the splits.
  void (*merge[kFloatTypes])(const QuantizedAttentionArgs&, int64_t begin, int64_t end);
  void (*finish[kFloatTypes])(const QuantizedAttentionArgs&, int64_t begin, int64_t end);
  int64_t rows;  // most rows of a part
};

MK_KERNELS(QuantizedAttentionKernels, quantized_attention)

}  // namespace mk::cpu
