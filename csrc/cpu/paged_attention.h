// Arguments and kernel table of paged_attention; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// Keys or values "pages slots heads width" by their element strides; the last dimension is contiguous.
struct PagedRows {
  const void* data;
  int64_t page, slot, head, width;
};

struct PagedArgs {
  const void* query;
  int64_t query_b, query_h, query_q;
  PagedRows key, value;
  const int64_t* pages;    // [B][most]: checked, of every page that a row uses
  const int64_t* lengths;  // [B]
  int64_t most, slots, heads, key_heads, queries;
  double scale;
  bool causal;  // query i stands at key lengths[b] - queries + i
  void *out, *lse,
      *stats;  // [B][NH][Q] of value width, 1, and 2: the maximum of the scores, the sum of exp(score - it)
  // Results of run r of row b, for rows [NH][Q]: sums, base and total at partial_at[b] + r; only of rows with runs > 1.
  void* partial;
  const int64_t* partial_at;
  int64_t run_keys;  // keys of a run: a multiple of the kernel's tile
};

struct PagedKernels {
  int64_t (*forward_scratch[kFloatTypes])(const PagedArgs&);
  // Run `run` of row b, queries [begin, end) of all heads.
  void (*forward[kFloatTypes])(const PagedArgs&, int64_t b, int64_t run, int64_t begin, int64_t end, void* scratch);
  // Joins the runs of row b, in order.
  void (*merge[kFloatTypes])(const PagedArgs&, int64_t b, int64_t runs);
  int64_t query_group;  // queries of one task
};

MK_KERNELS(PagedKernels, paged_attention)

}  // namespace mk::cpu
