// Attention forward: for each block of keys, scores of a group of queries, a running softmax, and the weighted sum of
// the values.
//
//   base = running maximum of the scores, sum = sum of exp(score - base), sums = sum of exp(score - base) value;
//   out = sums / sum
//
// One task owns a group of queries and packs each key block once for all of them. Bytes moved an element of K or V: its
// size, once a group; everything between is in cache. Blocks that no query of the group sees are skipped.
#pragma once
#include "cpu/generic/attention_block.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kForwardKeys = 256, kForwardQueries = 48, kQueryGroup = 1024;

template <class A>
struct ForwardScratch {
  static constexpr int64_t kScoreRow = kForwardKeys + kLanes<A>;
  A *query, *sums, *base, *total, *key, *value, *scores, *bias, *kept, *shrink;
  int64_t value_row, used;

  ForwardScratch(const AttentionArgs& a, void* memory) : value_row(padded<A>(a.value_width)) {
    Carver carver(memory);
    const int64_t rows = smaller(kQueryGroup, a.queries), keys = padded<A>(smaller(kForwardKeys, a.keys));
    query = carver.take<A>(rows * padded<A>(a.width));
    sums = carver.take<A>(rows * value_row);
    base = carver.take<A>(rows);
    total = carver.take<A>(rows);
    key = carver.take<A>(keys * a.width);
    value = carver.take<A>(keys * value_row);
    scores = carver.take<A>(kForwardQueries * kScoreRow);
    bias = carver.take<A>(kForwardKeys);
    kept = carver.take<A>(kForwardKeys);
    shrink = carver.take<A>(kForwardQueries);
    used = carver.used();
  }
};

// Scores outside [seen.first, seen.last) become -inf; the rest is scaled and biased where a mask or the sign of the
// scale asks for it.
template <class A>
MK_INLINE void mask_scores(A* s, Range block, Range seen, const A* bias, A factor) {
  using V = Vec<A>;
  const int64_t begin = block.first / kLanes<A> * kLanes<A>, end = padded<A>(block.last);
  if (bias) {
    const V f = V::set1(factor), lowest = V::set1(-kInfinity<A>);
    for (int64_t k = begin; k < end; k += kLanes<A>) {
      const V shift = V::load(bias + k), x = fma(V::load(s + k), f, shift);
      select(shift == lowest, lowest, x).store(s + k);
    }
  }
  for (int64_t k = begin; k < seen.first; k++) s[k] = -kInfinity<A>;
  for (int64_t k = seen.last; k < end; k++) s[k] = -kInfinity<A>;
}

// One row of scores becomes weights relative to the new base; returns what the older sums must be multiplied by.
template <class A>
MK_INLINE A softmax_row(A* s, Range block, A factor, A& base, A& total, const A* kept) {
  using V = Vec<A>;
  const int64_t begin = block.first / kLanes<A> * kLanes<A>, end = padded<A>(block.last);
  V most = V::set1(-kInfinity<A>), other = most;
  int64_t k = begin;
  for (; k + 2 * kLanes<A> <= end; k += 2 * kLanes<A>) {
    most = max(most, V::load(s + k));
    other = max(other, V::load(s + k + kLanes<A>));
  }
  if (k < end) most = max(most, V::load(s + k));
  const A found = reduce_max(max(most, other)) * factor, old = base;
  base = found > old ? found : old;
  const A zero_point = base == -kInfinity<A> ? A(0) : base;
  const V f = V::set1(factor), zero = V::set1(zero_point);
  V sum = V::zero();
  for (k = begin; k < end; k += kLanes<A>) {
    V weight = power_of(V::load(s + k), f, zero);
    sum = sum + weight;
    if (kept) weight = weight * V::load(kept + k);
    weight.store(s + k);
  }
  if (base == old) {  // power(0) is not exactly 1, and short blocks would add that up
    total = total + reduce_add(sum);
    return A(1);
  }
  A shrink[kLanes<A>];
  power_of(V::set1(old), V::set1(A(1)), zero).store(shrink);
  total = total * shrink[0] + reduce_add(sum);
  return shrink[0];
}

// Where the mask or the sign of the scale forbids to take the maximum of the plain products.
MK_INLINE bool needs_bias(const AttentionArgs& a) { return a.mask || !(a.scale > 0 || a.softcap > 0); }

template <class A, class T>
void softmax_block(const AttentionArgs& a, const ForwardScratch<A>& w, int64_t b, int64_t h, int64_t query,
                   int64_t rows, int64_t first, Range block, A* base, A* total) {
  using V = Vec<A>;
  const bool biased = needs_bias(a);
  const A scale = factor_after_cap<A>(a);
  for (int64_t i = 0; i < rows; i++) {
    const Range all = seen_by(a, query + i);
    const Range seen = {larger(all.first - first, block.first), smaller(all.last - first, block.last)};
    A* s = w.scores + i * w.kScoreRow;
    if (a.softcap > 0) cap_scores<A>(a, s, block.first / kLanes<A> * kLanes<A>, padded<A>(block.last), nullptr);
    if (a.mask)
      load_mask<A, T>(a, b, h, query + i, first, block.first, block.last, w.bias);
    else if (biased)
      for (int64_t k = 0; k < kForwardKeys; k += kLanes<A>) V::zero().store(w.bias + k);
    // Vectors start before the block where it is not aligned: what the bias has there is overwritten by -inf.
    mask_scores(s, block, seen.first < seen.last ? seen : Range{block.last, block.last}, biased ? w.bias : nullptr,
                scale);
    if (a.seed) load_kept<A>(a, b, h, query + i, first, block.first, block.last, w.kept);
    w.shrink[i] = softmax_row(s, block, biased ? A(1) : scale, base[i], total[i], a.seed ? w.kept : nullptr);
  }
}

template <class A, class T>
void forward_block(const AttentionArgs& a, const ForwardScratch<A>& w, int64_t b, int64_t h, int64_t begin, int64_t end,
                   int64_t first, int64_t keys) {
  const int64_t shared = h / (a.heads / a.key_heads), width = padded<A>(a.width);
  const T* key = static_cast<const T*>(a.key.data) + b * a.key.b + shared * a.key.h + first * a.key.row;
  const T* value = static_cast<const T*>(a.value.data) + b * a.value.b + shared * a.value.h + first * a.value.row;
  pack_transposed(key, a.key.row, keys, a.width, w.key);
  const bool broken = pack_rows<true>(value, a.value.row, keys, a.value_width, w.value);
  for (int64_t at = begin; at < end; at += kForwardQueries) {
    const int64_t rows = smaller(kForwardQueries, end - at), row = at - begin;
    const Range block = seen_by_block(a, at, at + rows, first, first + keys);
    if (block.first == block.last) continue;
    fetch_mask<T>(a, b, h, at, rows, first, block);
    product<A>({w.query + row * width, width, 1, w.key, a.width, 0, w.scores, w.kScoreRow}, rows, keys, block.first,
               block.last, a.width, nullptr, false);
    softmax_block<A, T>(a, w, b, h, at, rows, first, block, w.base + row, w.total + row);
    A* sums = w.sums + row * w.value_row;
    product<A>({w.scores + block.first, w.kScoreRow, 1, w.value, keys, block.first, sums, w.value_row}, rows,
               a.value_width, 0, a.value_width, block.last - block.first, w.shrink, true);
    if (broken) spill(w.scores, w.kScoreRow, rows, block, value, a.value.row, a.value_width, sums, w.value_row);
  }
}

template <class A, class T>
MK_INLINE void write_row(const AttentionArgs& a, int64_t row, const A* sums, A base, A total) {
  using V = Vec<A>;
  const A shrink = a.sink ? join_sink(sink_of<A, T>(a, row / a.queries % a.heads), base, total) : A(1);
  static_cast<A*>(a.lse_data)[row] = total == A(0) ? -kInfinity<A> : A(double(base) + __builtin_log(double(total)));
  A* stats = static_cast<A*>(a.stats_data) + 2 * row;
  stats[0] = base, stats[1] = total;
  const V factor = V::set1(total == A(0) ? A(0) : shrink / total);
  T* out = static_cast<T*>(a.out_data) + row * a.value_width;
  for_each_vec<V>(a.value_width, [&](int64_t j, auto part) { store(V::load(sums + j) * factor, out + j, part); });
}

// Where the partial result of one split lies.
template <class A>
struct Partial {
  A *sums, *base, *total;
  Partial(const AttentionArgs& a, int64_t b, int64_t h, int64_t split) {
    const int64_t rows = a.queries, row = padded<A>(a.value_width);
    sums = static_cast<A*>(a.partial) + ((b * a.heads + h) * a.splits + split) * rows * (row + 2);
    base = sums + rows * row;
    total = base + rows;
  }
};

// attention_few.inl.h, attention_lanes.inl.h
constexpr int64_t kFewRows = 8, kLaneQueries = 64;
template <class A>
int64_t few_scratch(const AttentionArgs& a);
template <class A, class T>
void few_forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split, void* memory);
template <class A, class T>
void lanes_forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                   void* memory);
// What changes single scores and weights is left to the blocks.
MK_INLINE bool fits_lanes(const AttentionArgs& a, int64_t queries) {
  return queries <= kLaneQueries && a.scale > 0 && !a.mask && !a.seed && !(a.softcap > 0);
}

template <class A, class T>
void forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split, void* memory) {
  if (a.queries <= kFewRows) return few_forward<A, T>(a, b, h, begin, end, split, memory);
  if (fits_lanes(a, a.queries)) return lanes_forward<A, T>(a, b, h, begin, end, split, memory);
  const ForwardScratch<A> w(a, memory);
  const int64_t rows = end - begin;
  pack_plain(static_cast<const T*>(a.query.data) + b * a.query.b + h * a.query.h + begin * a.query.row, a.query.row,
             rows, a.width, w.query);
  for (int64_t i = 0; i < rows * w.value_row; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < rows; i++) w.base[i] = -kInfinity<A>, w.total[i] = 0;
  const int64_t start = split * a.split_keys, stop = smaller(start + a.split_keys, a.seen_keys);
  const Range seen = seen_by_block(a, begin, end, start, stop);
  for (int64_t first = start + seen.first / kForwardKeys * kForwardKeys; first < start + seen.last;
       first += kForwardKeys)
    forward_block<A, T>(a, w, b, h, begin, end, first, smaller(kForwardKeys, stop - first));
  if (a.splits == 1) {
    for (int64_t i = 0; i < rows; i++)
      write_row<A, T>(a, (b * a.heads + h) * a.queries + begin + i, w.sums + i * w.value_row, w.base[i], w.total[i]);
    return;
  }
  const Partial<A> out(a, b, h, split);
  for (int64_t i = 0; i < rows * w.value_row; i++) out.sums[begin * w.value_row + i] = w.sums[i];
  for (int64_t i = 0; i < rows; i++) out.base[begin + i] = w.base[i], out.total[begin + i] = w.total[i];
}

template <class A, class T>
void merge(const AttentionArgs& a, int64_t b, int64_t h) {
  using V = Vec<A>;
  const int64_t row = padded<A>(a.value_width);
  for (int64_t i = 0; i < a.queries; i++) {
    Partial<A> joined(a, b, h, 0);
    A base = -kInfinity<A>;
    for (int64_t split = 0; split < a.splits; split++) {
      const A other = Partial<A>(a, b, h, split).base[i];
      if (!(other <= base)) base = other;
    }
    A total = 0;
    for (int64_t split = 0; split < a.splits; split++) {
      const Partial<A> part(a, b, h, split);
      A weight[kLanes<A>];
      const A zero_point = base == -kInfinity<A> ? A(0) : base;
      power_of(V::set1(part.base[i]), V::set1(A(1)), V::set1(zero_point)).store(weight);
      total += weight[0] * part.total[i];
      for (int64_t j = 0; j < row; j += kLanes<A>) {
        const V added = V::load(part.sums + i * row + j) * V::set1(weight[0]);
        (split ? V::load(joined.sums + i * row + j) + added : added).store(joined.sums + i * row + j);
      }
    }
    write_row<A, T>(a, (b * a.heads + h) * a.queries + i, joined.sums + i * row, base, total);
  }
}

template <class A>
int64_t forward_scratch(const AttentionArgs& a) {
  return larger(ForwardScratch<A>(a, nullptr).used, few_scratch<A>(a));
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
