// Arguments and kernel table of retrieval_attention; included by the host side and by every ISA level. The local
// context is attention's own work (attention.h); these kernels add the retrieved memories to it.
#pragma once
#include "cpu/attention.h"

namespace mk::cpu {

struct RetrievalArgs {
  AttentionTensor query, memory_key, memory_value, index, bias, dout, dlse;  // the last dimensions are contiguous
  void *out, *lse, *stats, *dbias, *dmemory_key,
      *dmemory_value;  // written, contiguous; a gradient nobody needs is null
  int64_t batch, heads, key_heads, queries, rows, slots, width, value_width;
  double scale;

  // Of the accumulation type. Forward: what attention leaves of one split of a head, sums [Q][whole vectors of V], base
  // [Q], total [Q]. Backward: weight and ds of each retrieval, [head][Q][slots][2] from head `first_head` of [B][NH]
  // on; null: nobody needs them.
  void *local, *retrieved;
  int64_t first_head;
  bool key_cleared, value_cleared;  // these gradients read as zero already: rows that nobody retrieved stay unwritten
};

struct RetrievalKernels {
  int64_t (*scratch[kFloatTypes])(const RetrievalArgs&);  // bytes, of the three below
  // Queries [begin, end) of entry b, head h: the local part and the memories joined in one softmax.
  void (*forward[kFloatTypes])(const RetrievalArgs&, int64_t b, int64_t h, int64_t begin, int64_t end, void* scratch);
  // Base and unit of the rows that attention's restate() has computed again from the local keys alone: with the
  // memories.
  void (*rejoin[kFloatTypes])(const RetrievalArgs&, const AttentionArgs&, int64_t b, int64_t h, int64_t begin,
                              int64_t end, void* scratch);
  // Weights and ds of the memories of these queries, their rows_delta, and their sums of dquery: in dquery where it is
  // of the accumulation type, else the second run of dquery_sums.
  void (*gradient[kFloatTypes])(const RetrievalArgs&, const AttentionArgs&, int64_t b, int64_t h, int64_t begin,
                                int64_t end, void* scratch);
  // Rows [begin, end) of [B][NH][Q]: dquery from the sums of the local keys and of the memories.
  void (*finish[kFloatTypes])(const RetrievalArgs&, const AttentionArgs&, int64_t begin, int64_t end);
  // Gradients of memory rows [first, last) of key head h: each row sums what its retrievals give, in the order of the
  // queries.
  int64_t (*memory_scratch)(const RetrievalArgs&, int64_t rows);
  void (*memory[kFloatTypes])(const RetrievalArgs&, int64_t b, int64_t h, int64_t first, int64_t last, void* scratch);
};

MK_KERNELS(RetrievalKernels, retrieval_attention)

}  // namespace mk::cpu
