// Arguments and kernel table of attention; included by the host side and by every ISA level.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

// A tensor "B heads rows width" by its element strides; the last dimension is contiguous.
struct AttentionTensor {
  const void* data;
  int64_t b, h, row;
};

struct AttentionArgs {
  AttentionTensor query, key, value, dout, out, dlse;
  const void* stats;  // [B][NH][Q][2]: the maximum m of the scores of a query, the sum of exp(score - m)
  void *out_data, *lse_data, *stats_data, *dquery, *dkey, *dvalue, *dmask,
      *dsink;         // written, contiguous; a gradient nobody needs is null
  int64_t dmask_row;  // elements from the gradient of one query's mask to the next one's
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  double scale, softcap;       // softcap > 0: scores s become softcap tanh(s / softcap) before the mask is added
  int64_t left, right, shift;  // query i sees keys i + shift - left to i + shift + right; a limit < 0 is none

  // Keys of each batch entry (null: all), and what follows from it for one of them, see entry_of().
  const int64_t* lengths;
  int64_t lengths_b;
  bool bottom_right;  // the last query stands at the last key
  int64_t seen_keys;  // nobody sees a key from here on

  const void* sink;  // [NH], dtype of the call: one more score of every row of a head; null: none
  int64_t sink_h;

  // Additive (dtype of the call) or boolean mask; null: none. Strides 0 where it broadcasts.
  const void* mask;
  bool mask_boolean;
  int64_t mask_b, mask_h, mask_q, mask_k, mask_group;  // batch row b uses mask row b / mask_group
  int64_t mask_batch, mask_heads, mask_queries, mask_keys;

  const int64_t* seed;  // one a batch entry; null: no dropout
  int64_t seed_b;
  uint32_t threshold;  // a weight is dropped if its hash is below
  bool drop_all;
  double keep_scale;

  // Forward of few queries: the keys are split into `splits` runs of split_keys; partial holds [task][accumulators,
  // base, sum].
  int64_t splits, split_keys;
  void* partial;
  // Backward, of the accumulation type: what prepare() writes, [B][NH][Q] each, and sums of dquery
  // [run][B][NH][Q][width]. A weight is rows_unit exp(score - rows_base); base +inf, unit 0 where nothing is seen.
  // rows_sink: with a sink, the gradient of its score in this row. rows_moved: see AttentionKernels::center.
  void *rows_base, *rows_unit, *rows_delta, *rows_sink, *rows_moved, *dquery_sums;
  double restate_beyond;  // of |rows_base|: see AttentionKernels::restate
  bool joint;             // backward: these keys are not all that the softmax of a row goes over
};

// The arguments for batch entry b; `room` holds them where entries differ.
inline const AttentionArgs& entry_of(const AttentionArgs& a, int64_t b, AttentionArgs& room) {
  if (!a.lengths) return a;
  room = a;
  room.seen_keys = a.lengths[b * a.lengths_b];
  if (a.bottom_right) room.shift = room.seen_keys - a.queries;
  return room;
}

// Keys [first, last) against queries [begin, end) of batch entry b and key head h.
struct AttentionPart {
  int64_t b, h, first, last, begin, end;
  int64_t run;              // which dquery_sums it adds to
  bool dquery, dkv;         // what is wanted
  bool dmask;               // ds is written to the place that the mask has for every score,
  bool add_dmask;           // or added where batch rows or heads share it: by one task, in order
  bool add_dquery = false;  // the sums hold those of the keys before
};

struct AttentionKernels {
  // Bytes of scratch that one forward or backward call needs.
  int64_t (*forward_scratch[kFloatTypes])(const AttentionArgs&);
  int64_t (*backward_scratch[kFloatTypes])(const AttentionArgs&);
  // Queries [begin, end) of entry b, head h over the keys of one split.
  void (*forward[kFloatTypes])(const AttentionArgs&, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                               void* scratch);
  // Joins the splits of rows [begin, end) of entry b, head h, in order.
  void (*merge[kFloatTypes])(const AttentionArgs&, int64_t b, int64_t h);
  // Rows [begin, end) of [B][NH][Q]: rows_base, rows_unit and rows_delta.
  void (*prepare[kFloatTypes])(const AttentionArgs&, int64_t begin, int64_t end);
  // Where forward summed the products of a score in another order than backward will, the two differ by a rounding of
  // the score: for scores beyond a limit (infinity: never) that is too much, and base and unit of queries [begin, end)
  // are computed again.
  double (*restate_beyond[kFloatTypes])(const AttentionArgs&);
  void (*restate[kFloatTypes])(const AttentionArgs&, int64_t b, int64_t h, int64_t begin, int64_t end, void* scratch);
  // Exact rows_delta of queries [begin, end), by a pass over their keys. Of joint keys rows_moved [rows][2]: the sums
  // by whose quotient it is off, the second one -1 where `out` is not rounded and keys are many: that is exact enough.
  void (*center[kFloatTypes])(const AttentionArgs&, int64_t b, int64_t h, int64_t begin, int64_t end, void* scratch);
  void (*backward[kFloatTypes])(const AttentionArgs&, const AttentionPart&, void* scratch);
  // Rows [begin, end) of [B][NH][Q]: dquery from its sums over the runs, in order.
  void (*finish[kFloatTypes])(const AttentionArgs&, int64_t begin, int64_t end, int64_t runs);
  // Queries [begin, end) of row (b, h) of a mask that broadcasts: its gradient summed over all that share it.
  void (*mask_backward[kFloatTypes])(const AttentionArgs&, int64_t b, int64_t h, int64_t first, int64_t last,
                                     void* scratch);
  // dsink of heads [first, last): rows_sink summed over batch entries and queries, in order.
  void (*sink_backward[kFloatTypes])(const AttentionArgs&, int64_t first, int64_t last);
  int64_t query_group[kFloatTypes];  // queries of one forward task: the packed keys are used this often
  int64_t key_block, query_block;    // backward works on whole blocks from key 0 and query 0
};

MK_KERNELS_AMX(AttentionKernels, attention)

}  // namespace mk::cpu
