// Arguments and kernel table of weighted_bag; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

constexpr int64_t kBagChunk = 1024;  // places of a bag that one sum goes over; sums of longer bags are joined in order
constexpr int64_t kBagRun = 512;     // places of a table row likewise, in backward

// A place names a row: the row, and the place itself as b J + j.
struct BagPlace {
  int64_t row, at;
};

// Element strides; the last dimensions are contiguous. Gradients nobody needs are null.
struct BagArgs {
  const void *table, *weight, *dout;  // "K D", "B J", "B D"
  const int64_t* index;               // "B J"
  void *out, *dtable, *dweight;       // contiguous
  int64_t rows, bags, places, width;
  int64_t table_k, weight_b, index_b, dout_b;
  int64_t chunks;  // of a bag
  void* sums;      // [B][chunks][D] of the accumulation type, where a bag has several
  const BagPlace* sorted;
};

struct BagKernels {
  // Pieces [begin, end) of [B][chunks]; scratch: kBagChunk pointers, as many numbers of the accumulation type, and D.
  void (*forward[kFloatTypes])(const BagArgs&, int64_t begin, int64_t end, void* scratch);
  void (*join[kFloatTypes])(const BagArgs&, int64_t bag);
  // Whole rows, whose places are sorted[begin .. end); scratch: D numbers of the accumulation type.
  void (*backward[kFloatTypes])(const BagArgs&, int64_t begin, int64_t end, void* scratch);
  // A part of the places of one row: its sum to `slot`; later the `count` slots of the row joined in order.
  void (*backward_run[kFloatTypes])(const BagArgs&, int64_t begin, int64_t end, void* slot);
  void (*backward_join[kFloatTypes])(const BagArgs&, int64_t row, const void* slots, int64_t count);
};

MK_KERNELS(BagKernels, weighted_bag)

}  // namespace mk::cpu
