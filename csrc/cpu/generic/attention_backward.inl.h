// Attention backward, weights recomputed from the saved maximum and sum of each query:
//
//   p = exp(score - maximum) / sum, ds = p (dout . value - delta), delta = dout . out - dlse
//   dvalue += p^T dout, dkey += scale ds^T query, dquery += scale ds key, dmask = ds
//   with softcap: ds of query and key is that of the mask times 1 - tanh^2; with a sink of weight p: its ds = -p delta
//
// A part owns a run of keys: it packs a block once, keeps its dkey and dvalue in scratch while all queries pass, and
// adds to dquery in the order of the blocks. Where several parts share a query each has its own dquery sums, joined in
// order by finish().
#pragma once
#include "cpu/generic/attention_forward.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kBackwardKeys = 128, kBackwardQueries = 64;

template <class A>
struct BackwardScratch {
  static constexpr int64_t kScoreRow = kBackwardKeys + kLanes<A>;
  A *key_columns, *value_columns, *key, *dkey, *dvalue, *query, *query_panels, *dout, *dout_panels, *scores, *gradients,
      *slopes, *bias, *kept, *mask;
  int64_t query_row, value_row, used;

  BackwardScratch(const AttentionArgs& a, void* memory)
      : query_row(padded<A>(a.width)), value_row(padded<A>(a.value_width)) {
    Carver carver(memory);
    key_columns = carver.take<A>(kBackwardKeys * a.width);
    value_columns = carver.take<A>(kBackwardKeys * a.value_width);
    key = carver.take<A>(kBackwardKeys * query_row);
    dkey = carver.take<A>(kBackwardKeys * query_row);
    dvalue = carver.take<A>(kBackwardKeys * value_row);
    query = carver.take<A>(kBackwardQueries * query_row);
    query_panels = a.width > kPanel<A> ? carver.take<A>(kBackwardQueries * query_row) : query;
    dout = carver.take<A>(kBackwardQueries * value_row);
    dout_panels = a.value_width > kPanel<A> ? carver.take<A>(kBackwardQueries * value_row) : dout;
    scores = carver.take<A>(kBackwardQueries * kScoreRow);
    gradients = carver.take<A>(kBackwardQueries * kScoreRow);
    slopes = carver.take<A>(a.softcap > 0 ? kBackwardQueries * kScoreRow : 0);
    bias = carver.take<A>(kBackwardKeys);
    kept = carver.take<A>(kBackwardKeys);
    mask = carver.take<A>(a.dmask ? kBackwardQueries * kScoreRow : 0);
    used = carver.used();
  }
};

template <class T>
MK_INLINE const T* rows_of(const AttentionTensor& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(t.data) + b * t.b + h * t.h + row * t.row;
}
MK_INLINE int64_t row_index(const AttentionArgs& a, int64_t b, int64_t h, int64_t query) {
  return (b * a.heads + h) * a.queries + query;
}

template <class A>
MK_INLINE A dlse_of(const AttentionArgs& a, int64_t b, int64_t h, int64_t query) {
  return a.dlse.data ? *rows_of<A>(a.dlse, b, h, query) : A(0);
}

// All keys of the query lie in one block: its delta is summed there, which is exact where a rounded `out` is not.
MK_INLINE bool in_one_block(const AttentionArgs& a, Range seen) {
  return !a.joint && (seen.first ^ (seen.last - 1)) < kBackwardKeys;
}

template <class A, class T>
void prepare(const AttentionArgs& a, int64_t begin, int64_t end) {
  using V = Vec<A>;
  AttentionArgs room;
  for (int64_t row = begin; row < end; row++) {
    const int64_t query = row % a.queries, h = row / a.queries % a.heads, b = row / a.queries / a.heads;
    const bool whole = in_one_block(a, seen_by(entry_of(a, b, room), query));
    V sum = V::zero();
    if (a.dout.data && (!whole || a.sink)) {
      const T *dout = rows_of<T>(a.dout, b, h, query), *out = rows_of<T>(a.out, b, h, query);
      for_each_vec<V>(a.value_width,
                      [&](int64_t j, auto part) { sum = fma(load<V>(dout + j, part), load<V>(out + j, part), sum); });
    }
    const A dlse = dlse_of<A>(a, b, h, query);
    const A* stats = static_cast<const A*>(a.stats) + 2 * row;
    const bool blind = stats[1] == A(0);
    const A product = reduce_add(sum);
    static_cast<A*>(a.rows_delta)[row] = (whole ? A(0) : product) - dlse;
    static_cast<A*>(a.rows_base)[row] = blind ? kInfinity<A> : stats[0];
    static_cast<A*>(a.rows_unit)[row] = blind ? A(0) : A(1) / stats[1];
    if (!a.sink) continue;
    const A sink = sink_of<A, T>(a, h), share = A(__builtin_exp(double(sink) - double(stats[0]))) / stats[1];
    static_cast<A*>(a.rows_sink)[row] = sink == -kInfinity<A> ? A(0) : share * (dlse - product);
  }
}

// The same where the row is whole: weights are normalised by their own maximum and sum (and the sink's: -inf is none),
// and delta is the sum over the row.
template <class A>
MK_INLINE void whole_gradient_row(A* s, A* g, Range block, A factor, A delta, const A* kept, A sink, bool single) {
  using V = Vec<A>;
  const int64_t begin = block.first / kLanes<A> * kLanes<A>;
  V most = V::set1(-kInfinity<A>), total = V::zero(), sum = V::zero();
  for (int64_t k = begin; k < block.last; k += kLanes<A>) most = max(most, V::load(s + k));
  const A highest = reduce_max(most) * factor, top = sink > highest ? sink : highest;
  const V f = V::set1(factor), base = V::set1(top == -kInfinity<A> ? A(0) : top);
  for (int64_t k = begin; k < block.last; k += kLanes<A>) {
    const V weight = power_of(V::load(s + k), f, base);
    total = total + weight;
    weight.store(s + k);
  }
  const A all = reduce_add(total) + (sink == -kInfinity<A> ? A(0) : A(__builtin_exp(double(sink) - double(top))));
  const V normal = V::set1(all == A(0) ? A(0) : A(1) / all);
  for (int64_t k = begin; k < block.last; k += kLanes<A>) {
    const V weight = V::load(s + k) * normal, keep = kept ? V::load(kept + k) : V::set1(A(1));
    const V gradient = select(weight == V::zero(), V::zero(), V::load(g + k) * keep);
    sum = fma(weight, gradient, sum);
    gradient.store(g + k);
    weight.store(s + k);
  }
  // A query that sees one key has weight 1 whatever the score: exactly no gradient, not the rounding error of a
  // difference.
  const V less = V::set1(reduce_add(sum) + delta);
  for (int64_t k = begin; k < block.last; k += kLanes<A>) {
    const V weight = V::load(s + k), gradient = single ? V::set1(-delta) : V::load(g + k) - less;
    (weight * gradient).store(g + k);
    if (kept) (weight * V::load(kept + k)).store(s + k);
  }
}

template <class A, class T>
void load_keys(const AttentionArgs& a, const BackwardScratch<A>& w, int64_t b, int64_t shared, int64_t first,
               int64_t keys) {
  pack_transposed(rows_of<T>(a.key, b, shared, first), a.key.row, keys, a.width, w.key_columns);
  pack_transposed(rows_of<T>(a.value, b, shared, first), a.value.row, keys, a.value_width, w.value_columns);
}

// A row of scores and of dout . value becomes a row of weights (times what dropout kept) and of ds; a weight is
// unit exp(score - base).
template <class A>
MK_INLINE void gradient_row(A* s, A* g, Range block, A factor, A base, A delta, const A* kept, A unit) {
  using V = Vec<A>;
  const V f = V::set1(factor), zero = V::set1(base), less = V::set1(delta);
  for (int64_t k = block.first / kLanes<A> * kLanes<A>; k < block.last; k += kLanes<A>) {
    const V weight = power_of(V::load(s + k), f, zero) * V::set1(unit);
    const V keep = kept ? V::load(kept + k) : V::set1(A(1));
    const V gradient = weight * (V::load(g + k) * keep - less);
    select(weight == V::zero(), V::zero(), gradient).store(g + k);  // 0 also where the value is not finite
    (weight * keep).store(s + k);
  }
}

// Rows of a tensor as an operand: where they lie, which saves 5% of the time, or packed. Rows farther apart than
// kNearRow elements would share a few sets of the first cache.
template <class A>
struct Operand {
  const A* at;
  int64_t row;
  bool packed;
};
constexpr int64_t kNearRow = 128;
template <class A, class T>
MK_INLINE Operand<A> operand(const AttentionTensor& t, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t width,
                             A* room) {
  const T* from = rows_of<T>(t, b, h, first);
  if constexpr (std::is_same<A, T>::value)
    if (width % kLanes<A> == 0 && t.row >= width && t.row <= kNearRow) return {from, t.row, false};
  pack_plain(from, t.row, rows, width, room);
  return {room, padded<A>(width), true};
}
// The same rows as right operand: panels, row 0, unless they are taken from where they lie. `room` is that of the plain
// ones where they are one panel.
template <class A, class T>
MK_INLINE Operand<A> right_operand(Operand<A> plain, const AttentionTensor& t, int64_t b, int64_t h, int64_t first,
                                   int64_t rows, int64_t width, A* room) {
  if (!plain.packed) return plain;
  if (plain.at != room) pack_rows<false>(rows_of<T>(t, b, h, first), t.row, rows, width, room);
  return {room, 0, true};
}

// Products of queries [query, query + rows) with the loaded keys.
template <class A, class T>
Operand<A> product_block(const AttentionArgs& a, const BackwardScratch<A>& w, int64_t b, int64_t h, int64_t query,
                         int64_t rows, int64_t keys, Range block) {
  const Operand<A> queries = operand<A, T>(a.query, b, h, query, rows, a.width, w.query);
  product<A>({queries.at, queries.row, 1, w.key_columns, a.width, 0, w.scores, w.kScoreRow}, rows, keys, block.first,
             block.last, a.width, nullptr, false);
  if (needs_bias(a) && !a.mask)
    for (int64_t k = 0; k < kBackwardKeys; k++) w.bias[k] = 0;
  return queries;
}

// Masks row i of the products, of query `query`; returns the factor that its scores still lack.
template <class A, class T>
A score_row(const AttentionArgs& a, const BackwardScratch<A>& w, int64_t b, int64_t h, int64_t query, int64_t i,
            int64_t first, Range block) {
  const bool biased = needs_bias(a);
  const Range all = seen_by(a, query);
  Range seen = {larger(all.first - first, block.first), smaller(all.last - first, block.last)};
  if (seen.first >= seen.last) seen = {block.last, block.last};
  A* s = w.scores + i * w.kScoreRow;
  if (a.softcap > 0)
    cap_scores(a, s, block.first / kLanes<A> * kLanes<A>, padded<A>(block.last), w.slopes + i * w.kScoreRow);
  if (a.mask) load_mask<A, T>(a, b, h, query, first, block.first, block.last, w.bias);
  mask_scores(s, block, seen, biased ? w.bias : nullptr, factor_after_cap<A>(a));
  return biased ? A(1) : factor_after_cap<A>(a);
}

// Weights and ds of queries [query, query + rows) against the loaded keys; returns the rows of query and dout.
template <class A>
struct QueryRows {
  Operand<A> query, dout;
};
template <class A, class T>
QueryRows<A> gradient_block(const AttentionArgs& a, const BackwardScratch<A>& w, int64_t b, int64_t h, int64_t query,
                            int64_t rows, int64_t first, int64_t keys, Range block) {
  QueryRows<A> operands = {product_block<A, T>(a, w, b, h, query, rows, keys, block), {}};
  if (a.dout.data) {
    operands.dout = operand<A, T>(a.dout, b, h, query, rows, a.value_width, w.dout);
    product<A>({operands.dout.at, operands.dout.row, 1, w.value_columns, a.value_width, 0, w.gradients, w.kScoreRow},
               rows, keys, block.first, block.last, a.value_width, nullptr, false);
  }
  for (int64_t i = 0; i < rows; i++) {
    const Range all = seen_by(a, query + i);
    A *s = w.scores + i * w.kScoreRow, *g = w.gradients + i * w.kScoreRow;
    const A factor = score_row<A, T>(a, w, b, h, query + i, i, first, block);
    if (a.seed) load_kept<A>(a, b, h, query + i, first, block.first, block.last, w.kept);
    if (!a.dout.data)
      for (int64_t k = 0; k < w.kScoreRow; k++) g[k] = 0;
    const int64_t row = row_index(a, b, h, query + i);
    const A delta = static_cast<const A*>(a.rows_delta)[row], *kept = a.seed ? w.kept : nullptr;
    if (in_one_block(a, all))
      whole_gradient_row(s, g, block, factor, delta, kept, sink_of<A, T>(a, h), all.last - all.first <= 1 && !a.sink);
    else
      gradient_row(s, g, block, factor, static_cast<const A*>(a.rows_base)[row], delta, kept,
                   static_cast<const A*>(a.rows_unit)[row]);
  }
  return operands;
}

template <class A>
MK_INLINE bool is_beyond(const AttentionArgs& a, int64_t row) {
  const A base = static_cast<const A*>(a.rows_base)[row];
  return (base > A(a.restate_beyond) && base != kInfinity<A>) || base < -A(a.restate_beyond);
}
// Of all queries that share a key head, whichever part asks: the answer decides their bits.
template <class A>
bool any_beyond(const AttentionArgs& a, int64_t b, int64_t shared) {
  const int64_t rows = a.heads / a.key_heads * a.queries, from = (b * a.key_heads + shared) * rows;
  bool found = false;
  for (int64_t i = 0; i < rows; i++) found |= is_beyond<A>(a, from + i);
  return found;
}

template <class A, class T>
void restate(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, void* memory) {
  const BackwardScratch<A> w(a, memory);
  for (int64_t query = begin; query < end; query += kBackwardQueries) {
    const int64_t rows = smaller(kBackwardQueries, end - query), row = row_index(a, b, h, query);
    bool found = false;
    A base[kBackwardQueries], total[kBackwardQueries];
    for (int64_t i = 0; i < rows; i++) found |= is_beyond<A>(a, row + i), base[i] = -kInfinity<A>, total[i] = 0;
    for (int64_t first = 0; found && first < a.seen_keys; first += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, a.seen_keys - first);
      const Range block = seen_by_block(a, query, query + rows, first, first + keys);
      if (block.first == block.last) continue;
      const T* key = rows_of<T>(a.key, b, h / (a.heads / a.key_heads), first);
      pack_transposed(key, a.key.row, keys, a.width, w.key_columns);
      product_block<A, T>(a, w, b, h, query, rows, keys, block);
      for (int64_t i = 0; i < rows; i++) {
        const A factor = score_row<A, T>(a, w, b, h, query + i, i, first, block);
        softmax_row<A>(w.scores + i * w.kScoreRow, block, factor, base[i], total[i], nullptr);
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      if (!is_beyond<A>(a, row + i)) continue;
      if (a.sink) join_sink(sink_of<A, T>(a, h), base[i], total[i]);
      static_cast<A*>(a.rows_base)[row + i] = base[i];
      static_cast<A*>(a.rows_unit)[row + i] = A(1) / total[i];
    }
  }
}

// Weights times (dout . value - delta - dlse) should sum to 0 over what a query sees; to what they sum instead, over
// the sum of the weights, delta is off. Set right it is exact where a rounded `out` is not: where all values are nearly
// equal.
template <class A, class T>
void center(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, void* memory) {
  using V = Vec<A>;
  const BackwardScratch<A> w(a, memory);
  for (int64_t query = begin; query < end; query += kBackwardQueries) {
    const int64_t rows = smaller(kBackwardQueries, end - query), row = row_index(a, b, h, query);
    const Range all_keys = seen_by_block(a, query, query + rows, 0, a.seen_keys);
    if (a.joint && sizeof(T) == sizeof(A) && all_keys.last - all_keys.first > kBackwardKeys) {
      for (int64_t i = 0; i < rows; i++) static_cast<A*>(a.rows_moved)[2 * (row + i) + 1] = -1;
      continue;
    }
    V moved[kBackwardQueries], total[kBackwardQueries];
    for (int64_t i = 0; i < rows; i++) moved[i] = total[i] = V::zero();
    for (int64_t first = 0; first < a.seen_keys; first += kBackwardKeys) {
      const int64_t keys = smaller(kBackwardKeys, a.seen_keys - first);
      const Range block = seen_by_block(a, query, query + rows, first, first + keys);
      if (block.first == block.last) continue;
      load_keys<A, T>(a, w, b, h / (a.heads / a.key_heads), first, keys);
      gradient_block<A, T>(a, w, b, h, query, rows, first, keys, block);
      for (int64_t i = 0; i < rows; i++) {
        const V dlse = V::set1(dlse_of<A>(a, b, h, query + i));
        for (int64_t k = block.first / kLanes<A> * kLanes<A>; k < block.last; k += kLanes<A>) {
          const V weight = V::load(w.scores + i * w.kScoreRow + k);
          moved[i] = moved[i] + (V::load(w.gradients + i * w.kScoreRow + k) - weight * dlse);
          total[i] = total[i] + weight;
        }
      }
    }
    for (int64_t i = 0; i < rows; i++) {
      const A by = reduce_add(moved[i]), all = reduce_add(total[i]);
      if (a.joint)
        static_cast<A*>(a.rows_moved)[2 * (row + i)] = by, static_cast<A*>(a.rows_moved)[2 * (row + i) + 1] = all;
      else if (all != A(0) && !in_one_block(a, seen_by(a, query + i)))
        static_cast<A*>(a.rows_delta)[row + i] += by / all;
    }
  }
}

// Where the gradient of the mask of a query starts.
MK_INLINE int64_t mask_row_index(const AttentionArgs& a, int64_t b, int64_t h, int64_t query) {
  return (b / a.mask_group * a.mask_heads + (a.mask_heads == 1 ? 0 : h)) * a.queries + query;
}

template <class A, class T, bool add = false>
void write_mask_rows(const AttentionArgs& a, const A* from, int64_t from_row, int64_t rows, Range block,
                     int64_t mask_row, int64_t first) {
  using V = Vec<A>;
  for (int64_t i = 0; i < rows; i++) {
    T* out = static_cast<T*>(a.dmask) + (mask_row + i) * a.dmask_row + first + block.first;
    for_each_vec<V>(block.last - block.first, [&](int64_t k, auto part) {
      const V x = load<V>(from + i * from_row + block.first + k, part);
      store((add ? load<V>(out + k, part) : V::zero()) + x, out + k, part);  // -0 becomes 0 either way
    });
  }
}

template <class A, class T>
void backward_block(const AttentionArgs& a, const AttentionPart& part, const BackwardScratch<A>& w, int64_t h,
                    int64_t query, int64_t rows, int64_t first, int64_t keys, Range block, bool broken, bool add) {
  fetch_mask<T>(a, part.b, h, query, rows, first, block);
  const QueryRows<A> operands = gradient_block<A, T>(a, w, part.b, h, query, rows, first, keys, block);
  if (part.dmask || part.add_dmask) {
    const auto write = part.dmask ? write_mask_rows<A, T> : write_mask_rows<A, T, true>;
    write(a, w.gradients, w.kScoreRow, rows, block, mask_row_index(a, part.b, h, query), first);
  }
  for (int64_t i = 0; a.softcap > 0 && i < rows; i++)
    slope_gradients(w.gradients + i * w.kScoreRow, w.slopes + i * w.kScoreRow, block.first / kLanes<A> * kLanes<A>,
                    padded<A>(block.last));
  const int64_t depth = block.last - block.first;
  if (part.dkv && a.dvalue && a.dout.data) {
    const Operand<A> dout =
        right_operand<A, T>(operands.dout, a.dout, part.b, h, query, rows, a.value_width, w.dout_panels);
    product<A>({w.scores + block.first, 1, w.kScoreRow, dout.at, rows, 0, w.dvalue + block.first * w.value_row,
                w.value_row, dout.row},
               depth, a.value_width, 0, a.value_width, rows, nullptr, add);
  }
  if (part.dkv && a.dkey) {
    const Operand<A> queries =
        right_operand<A, T>(operands.query, a.query, part.b, h, query, rows, a.width, w.query_panels);
    product<A>({w.gradients + block.first, 1, w.kScoreRow, queries.at, rows, 0, w.dkey + block.first * w.query_row,
                w.query_row, queries.row},
               depth, a.width, 0, a.width, rows, nullptr, add);
  }
  if (part.dquery) {
    A* sums = static_cast<A*>(a.dquery_sums) +
              (part.run * a.batch * a.heads * a.queries + row_index(a, part.b, h, query)) * w.query_row;
    product<A>({w.gradients + block.first, w.kScoreRow, 1, w.key, keys, block.first, sums, w.query_row}, rows, a.width,
               0, a.width, depth, nullptr, true);
    if (broken)
      spill(w.gradients, w.kScoreRow, rows, block, rows_of<T>(a.key, part.b, part.h, first), a.key.row, a.width, sums,
            w.query_row);
  }
}

template <class A, class T>
__attribute__((nothrow)) void write_keys(const A* from, int64_t from_row, int64_t rows, int64_t columns, A factor,
                                         T* out) {
  using V = Vec<A>;
  for (int64_t i = 0; i < rows; i++)
    for_each_vec<V>(columns, [&](int64_t j, auto part) {
      store(V::load(from + i * from_row + j) * V::set1(factor), out + i * columns + j, part);
    });
}

// Gradients of the keys past the end of the entry.
template <class T>
MK_INLINE void clear_unseen(const AttentionArgs& a, const AttentionPart& part) {
  const int64_t first = larger(part.first, a.seen_keys), count = part.last - first;
  if (!part.dkv || count <= 0) return;
  const int64_t row = (part.b * a.key_heads + part.h) * a.keys + first;
  if (a.dkey) __builtin_memset(static_cast<T*>(a.dkey) + row * a.width, 0, size_t(count * a.width) * sizeof(T));
  if (a.dvalue)
    __builtin_memset(static_cast<T*>(a.dvalue) + row * a.value_width, 0, size_t(count * a.value_width) * sizeof(T));
}

// attention_few.inl.h, attention_lanes.inl.h
MK_INLINE bool is_few(const AttentionArgs& a);
template <class A, class T>
void few_backward(const AttentionArgs& a, const AttentionPart& part, void* memory);
MK_INLINE bool is_in_lanes(const AttentionArgs& a);
template <class A, class T>
void lanes_backward(const AttentionArgs& a, const AttentionPart& part, void* memory);

template <class A, class T>
void backward(const AttentionArgs& a, const AttentionPart& part, void* memory) {
  clear_unseen<T>(a, part);
  if (is_few(a) && !any_beyond<A>(a, part.b, part.h)) return few_backward<A, T>(a, part, memory);
  if (is_in_lanes(a)) return lanes_backward<A, T>(a, part, memory);
  const BackwardScratch<A> w(a, memory);
  const int64_t group = a.heads / a.key_heads;
  if (part.dquery && !part.add_dquery)
    for (int64_t h = part.h * group; h < (part.h + 1) * group; h++) {
      A* sums = static_cast<A*>(a.dquery_sums) +
                (part.run * a.batch * a.heads * a.queries + row_index(a, part.b, h, part.begin)) * w.query_row;
      for (int64_t i = 0; i < (part.end - part.begin) * w.query_row; i++) sums[i] = 0;
    }
  const int64_t stop = smaller(part.last, a.seen_keys);
  for (int64_t first = part.first; first < stop; first += kBackwardKeys) {
    const int64_t keys = smaller(kBackwardKeys, stop - first);
    load_keys<A, T>(a, w, part.b, part.h, first, keys);
    const bool broken =
        part.dquery && pack_rows<true>(rows_of<T>(a.key, part.b, part.h, first), a.key.row, keys, a.width, w.key);
    // One block of queries that sees all the keys writes its sums, several add to them.
    const Range seen = seen_by_block(a, part.begin, part.end, first, first + keys);
    const bool one = group == 1 && part.end - part.begin <= kBackwardQueries && a.dout.data;
    const bool add = !one || seen.first > 0 || seen.last < keys;
    if (part.dkv && add) {
      for (int64_t i = 0; i < keys * w.query_row; i++) w.dkey[i] = 0;
      for (int64_t i = 0; i < keys * w.value_row; i++) w.dvalue[i] = 0;
    }
    for (int64_t h = part.h * group; h < (part.h + 1) * group; h++)
      for (int64_t query = part.begin; query < part.end; query += kBackwardQueries) {
        const int64_t rows = smaller(kBackwardQueries, part.end - query);
        const Range block = seen_by_block(a, query, query + rows, first, first + keys);
        if (block.first < block.last) backward_block<A, T>(a, part, w, h, query, rows, first, keys, block, broken, add);
      }
    if (!part.dkv) continue;
    const int64_t row = (part.b * a.key_heads + part.h) * a.keys + first;
    if (a.dkey) write_keys(w.dkey, w.query_row, keys, a.width, A(a.scale), static_cast<T*>(a.dkey) + row * a.width);
    if (a.dvalue)
      write_keys(w.dvalue, w.value_row, keys, a.value_width, A(1), static_cast<T*>(a.dvalue) + row * a.value_width);
  }
}

template <class A, class T>
void finish(const AttentionArgs& a, int64_t begin, int64_t end, int64_t runs) {
  using V = Vec<A>;
  const int64_t row = padded<A>(a.width), all = a.batch * a.heads * a.queries * row;
  for (int64_t i = begin; i < end; i++) {
    const A* sums = static_cast<const A*>(a.dquery_sums) + i * row;
    for_each_vec<V>(a.width, [&](int64_t j, auto part) {
      V sum = V::load(sums + j);
      for (int64_t run = 1; run < runs; run++) sum = sum + V::load(sums + run * all + j);
      store(sum * V::set1(A(a.scale)), static_cast<T*>(a.dquery) + i * a.width + j, part);
    });
  }
}

template <class A>
int64_t backward_scratch(const AttentionArgs& a) {
  return larger(BackwardScratch<A>(a, nullptr).used, few_scratch<A>(a));
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
