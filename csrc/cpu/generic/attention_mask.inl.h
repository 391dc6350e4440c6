// Gradient of an additive mask that broadcasts: ds summed over the batch rows, heads and queries that share an element,
// in their order, each sum owned by one task. Scores and weights are computed once more; nothing of size B NH Q K
// exists. And the gradient of a sink, a sum over the rows of its head.
#pragma once
#include "cpu/generic/attention_backward.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// What the elements of one mask row (b, h) are summed over.
struct Sharers {
  int64_t b, b_end, h, h_end;
};
MK_INLINE Sharers sharers(const AttentionArgs& a, int64_t b, int64_t h) {
  return {b * a.mask_group, (b + 1) * a.mask_group, a.mask_heads == 1 ? 0 : h, a.mask_heads == 1 ? a.heads : h + 1};
}

// A mask that has one value for all keys of a query shifts its scores together: all of its gradient comes through the
// log-sum-exp, less what the sink, which is not shifted, takes of it.
template <class A, class T>
void mask_of_rows(const AttentionArgs& a, int64_t b, int64_t h, int64_t first, int64_t last) {
  const Sharers all = sharers(a, b, h);
  const bool one_row = a.mask_queries == 1;
  double total = 0;  // of as many terms as there are rows
  for (int64_t query = first; query < last; query++) {
    double sum = 0;
    for (int64_t i = all.b; i < all.b_end; i++)
      for (int64_t j = all.h; j < all.h_end; j++) {
        const bool blind = static_cast<const A*>(a.rows_base)[row_index(a, i, j, query)] == kInfinity<A>;
        if (a.dlse.data && !blind)
          sum += *(static_cast<const A*>(a.dlse.data) + i * a.dlse.b + j * a.dlse.h + query * a.dlse.row);
        if (a.sink) sum -= static_cast<const A*>(a.rows_sink)[row_index(a, i, j, query)];
      }
    total += sum;
    if (!one_row) static_cast<T*>(a.dmask)[(b * a.mask_heads + h) * a.queries + query] = convert<T>::from(sum);
  }
  if (one_row) static_cast<T*>(a.dmask)[b * a.mask_heads + h] = convert<T>::from(total);
}

// Adds ds of one block of queries and keys, over all that share it, to w.mask; `one_row` adds the queries up too.
template <class A, class T>
void add_sharers(const AttentionArgs& whole, const BackwardScratch<A>& w, Sharers all, int64_t query, int64_t end,
                 int64_t first, int64_t all_keys, bool one_row) {
  using V = Vec<A>;
  const int64_t group = whole.heads / whole.key_heads;
  AttentionArgs room;
  for (int64_t b = all.b; b < all.b_end; b++) {
    const AttentionArgs& a = entry_of(whole, b, room);
    const int64_t keys = smaller(all_keys, a.seen_keys - first);
    for (int64_t h = all.h; keys > 0 && h < all.h_end; h++) {
      if (h == all.h || h % group == 0) load_keys<A, T>(a, w, b, h / group, first, keys);
      for (int64_t at = query; at < end; at += kBackwardQueries) {
        const int64_t rows = smaller(kBackwardQueries, end - at);
        const Range block = seen_by_block(a, at, at + rows, first, first + keys);
        if (block.first == block.last) continue;
        gradient_block<A, T>(a, w, b, h, at, rows, first, keys, block);
        for (int64_t i = 0; i < rows; i++) {
          A* sums = w.mask + (one_row ? 0 : i * w.kScoreRow);
          for (int64_t k = block.first / kLanes<A> * kLanes<A>; k < block.last; k += kLanes<A>)
            (V::load(sums + k) + V::load(w.gradients + i * w.kScoreRow + k)).store(sums + k);
        }
      }
    }
  }
}

template <class A, class T>
void sink_backward(const AttentionArgs& a, int64_t first, int64_t last) {
  using V = Vec<A>;
  for (int64_t h = first; h < last; h++) {
    A total = 0;
    for (int64_t b = 0; b < a.batch; b++) {
      const A* rows = static_cast<const A*>(a.rows_sink) + row_index(a, b, h, 0);
      V sum = V::zero();
      for_each_vec<V>(a.queries, [&](int64_t i, auto part) { sum = sum + load<V>(rows + i, part); });
      total += reduce_add(sum);
    }
    static_cast<T*>(a.dsink)[h] = convert<T>::from(total);
  }
}

// Row (b, h) of the mask. Tasks own queries [first, last) of it, or keys [first, last) where all queries share a row.
template <class A, class T>
void mask_backward(const AttentionArgs& a, int64_t b, int64_t h, int64_t first, int64_t last, void* memory) {
  if (a.mask_keys == 1)
    return mask_of_rows<A, T>(a, b, h, a.mask_queries == 1 ? 0 : first, a.mask_queries == 1 ? a.queries : last);
  const BackwardScratch<A> w(a, memory);
  const bool one_row = a.mask_queries == 1;
  const int64_t query = one_row ? 0 : first, end = one_row ? a.queries : last;
  const int64_t key = one_row ? first : 0, key_end = one_row ? last : a.keys;
  for (int64_t at = query; at < end; at += one_row ? end : kBackwardQueries) {
    const int64_t rows = one_row ? 1 : smaller(kBackwardQueries, end - at);
    for (int64_t block = key; block < key_end; block += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, key_end - block);
      for (int64_t i = 0; i < rows * w.kScoreRow; i++) w.mask[i] = 0;
      add_sharers<A, T>(a, w, sharers(a, b, h), at, one_row ? end : at + rows, block, keys, one_row);
      const int64_t row = (b * a.mask_heads + h) * a.mask_queries + (one_row ? 0 : at);
      write_mask_rows<A, T>(a, w.mask, w.kScoreRow, rows, {0, keys}, row, block);
    }
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
