// Arguments and kernel table of topk_read; included by the host side and by every ISA level.
#pragma once
#include "cpu/attention.h"

namespace mk::cpu {

struct TopkArgs {
  AttentionTensor query, key, value, dread, dweights;  // "B Q D", "B N D", "B N V", ...: one head, inner contiguous
  AttentionTensor index;                               // int64 "B Q k", backward
  const bool* mask;                                    // null: all rows take part
  int64_t mask_b;
  void *read, *weights;  // written, contiguous
  int64_t* chosen;
  void *dquery, *dkey, *dvalue;  // null: nobody needs it
  int64_t batch, queries, rows, width, value_width, slots;
  enum { dot, cosine, l2 } similarity;
  double scale;
  bool few;  // queries are summed lane by lane along their rows, not by tiles: the rows are read in place
  // Forward, [B][Q] of the accumulation type, -inf at first: a score that k rows of some finished search reach.
  // Searches of other rows read it at any time; it saves them work and changes no result.
  void* reached;
  void* given;  // backward, of the accumulation type: [B][Q][k][3]: weight, factor of the query, factor of the row
};

constexpr int64_t kTopkQueries = 256;  // most queries of one search

struct TopkKernels {
  int64_t (*pair_bytes[kFloatTypes])();
  int64_t (*search_scratch[kFloatTypes])(const TopkArgs&);
  // found[query - begin][k] = the best of rows [first, last) for queries [begin, end) of entry b, in any order; 0 where
  // there are fewer.
  void (*search[kFloatTypes])(const TopkArgs&, int64_t b, int64_t begin, int64_t end, int64_t first, int64_t last,
                              void* found, void* scratch);
  int64_t (*finish_scratch[kFloatTypes])(const TopkArgs&, int64_t parts);
  // The outputs of query q of entry b from `parts` sets of k pairs, `step` pairs apart.
  void (*finish[kFloatTypes])(const TopkArgs&, int64_t b, int64_t q, const void* found, int64_t parts, int64_t step,
                              void* scratch);
  int64_t (*gradient_scratch[kFloatTypes])(const TopkArgs&);
  void (*gradient[kFloatTypes])(const TopkArgs&, int64_t b, int64_t q, void* scratch);  // dquery and `given`
  int64_t (*memory_scratch[kFloatTypes])(const TopkArgs&, int64_t rows);
  void (*memory[kFloatTypes])(const TopkArgs&, int64_t b, int64_t first, int64_t last, void* scratch);
};

MK_KERNELS(TopkKernels, topk_read)

}  // namespace mk::cpu
