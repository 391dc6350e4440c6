// Arguments and kernel table of product_key_search; included by the host side and by every ISA level.
#pragma once
#include "cpu/attention.h"

namespace mk::cpu {

struct ProductKeyArgs {
  AttentionTensor query;    // "B NH 2 D": strides of b, h, half
  AttentionTensor subkeys;  // "NH 2 S D": of b the head, of h the half, of the rows the subkeys
  AttentionTensor index, dscores;
  void *scores, *dquery, *dsubkeys;  // written, contiguous; a gradient nobody needs is null
  int64_t* chosen;
  int64_t batch, heads, count, width, slots;
  void* packed;  // of the accumulation type: panels of the subkeys, [NH][2][panel][D][columns]
  // Backward, [NH][2][B][k]: the distinct subkeys that were chosen and, of the accumulation type, their gradients; how
  // many, [NH][2][B].
  int32_t *parts, *distinct;
  void* given;
};

constexpr int64_t kProductKeyQueries = 28;  // of a task

struct ProductKeyKernels {
  int64_t (*packed_bytes[kFloatTypes])(const ProductKeyArgs&);  // of one half of a head
  void (*pack[kFloatTypes])(const ProductKeyArgs&, int64_t half);
  int64_t (*scratch[kFloatTypes])(const ProductKeyArgs&);
  void (*forward[kFloatTypes])(const ProductKeyArgs&, int64_t h, int64_t begin, int64_t end, void* scratch);
  int64_t (*gradient_scratch[kFloatTypes])(const ProductKeyArgs&);
  // dquery, parts and given of queries [begin, end) of a head.
  void (*gradient[kFloatTypes])(const ProductKeyArgs&, int64_t h, int64_t begin, int64_t end, void* scratch);
  int64_t (*subkeys_scratch[kFloatTypes])(const ProductKeyArgs&, int64_t rows);
  void (*subkeys_gradient[kFloatTypes])(const ProductKeyArgs&, int64_t half, int64_t first, int64_t last,
                                        void* scratch);
};

MK_KERNELS(ProductKeyKernels, product_key_search)

}  // namespace mk::cpu
