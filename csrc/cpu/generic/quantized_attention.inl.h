// Attention of few queries over an int8 memory, with a scale for each row of keys and of values.
//
//   s = scale key_scale (q . key);   out = sum_k exp(s - base) value_scale value / sum_k exp(s - base)
//   ds = p (value_scale (dout . value) - delta);   dquery = sum_k ds scale key_scale key
//
// A task owns some query rows that share a key head and a run of keys, and passes over the run once, a tile of rows at
// a time: bytes are widened in registers; for more than kFewRows queries in the first cache
// (quantized_attention_lanes.inl.h). Bytes moved an element of the memory: 1, and 4 a scale.
// Precision: the accumulation type throughout, float for float and the half types, double for double.
#pragma once
#include "cpu/generic/quantized_attention_lanes.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
int64_t quantized_scratch(const QuantizedAttentionArgs& a) {
  return QuantizedScratch<A>(a, nullptr).used;
}

// Where row r of a part stands: its head and query, and its place in [B][NH][Q].
struct QuantizedRow {
  int64_t head, query, at;
};
MK_INLINE QuantizedRow quantized_row(const QuantizedAttentionArgs& a, const QuantizedPart& part, int64_t r) {
  const int64_t row = part.begin + r, head = part.h * (a.heads / a.key_heads) + row / a.queries;
  return {head, row % a.queries, (part.b * a.heads + head) * a.queries + row % a.queries};
}

template <class T>
MK_INLINE const T* quantized_at(const QuantizedTensor& t, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(t.data) + b * t.b + h * t.h + row * t.row;
}

template <class A, class T>
void load_vectors(const QuantizedAttentionArgs& a, const QuantizedPart& part, const QuantizedTensor& from,
                  int64_t width, A* to) {
  for (int64_t r = 0; r < part.end - part.begin; r++) {
    const QuantizedRow row = quantized_row(a, part, r);
    widen_rows(quantized_at<T>(from, part.b, row.head, row.query), 0, 1, width, to + r * width);
  }
}

// The keys that the entry sees of this split.
struct KeyRun {
  int64_t first, last;
  bool single;  // the entry sees one key in all
};
MK_INLINE KeyRun keys_of(const QuantizedAttentionArgs& a, const QuantizedPart& part) {
  int64_t seen = a.lengths ? a.lengths[part.b * a.lengths_b] : a.keys;
  seen = seen < 0 ? 0 : seen < a.keys ? seen : a.keys;
  const int64_t first = part.split * a.split_keys, last = first + a.split_keys;
  return {first, last < seen ? last : seen, seen == 1};
}

template <class A>
Rows<signed8<A>> quantized_tile(const QuantizedTensor& t, const QuantizedScratch<A>& w, const QuantizedPart& part,
                                int64_t first, int64_t last, int64_t width) {
  const signed8<A>* rows = quantized_at<signed8<A>>(t, part.b, part.h, first);
  const int64_t count = last - first < kTile ? last - first : kTile;
  const bool more = first + (kAhead + 1) * kTile <= last;
  return {rows, t.row, w.index, count, width, more ? rows + kAhead * kTile * t.row : nullptr, true};
}

// to[i] = factor times the scale of row i of the tile, 0 past its end.
template <class A>
void load_scales(const QuantizedTensor& t, const QuantizedPart& part, int64_t first, int64_t count, A factor, A* to) {
  const A* from = quantized_at<A>(t, part.b, part.h, first);
  for (int64_t i = 0; i < count; i++) to[i] = factor * from[i];
  for (int64_t i = count; i < kTile; i++) to[i] = 0;
}

// One row of products becomes weights, relative to the new base, times the scales of the values; returns what the older
// sums must be multiplied by.
template <class A>
MK_INLINE A quantized_softmax(A* s, int64_t count, const A* key_factor, const A* value_factor, A& base, A& powers) {
  using V = Vec<A>;
  V most = V::set1(-kInfinity<A>);
  for (int64_t k = 0; k < count; k += V::kLanes) {
    const V score = V::load(s + k) * V::load(key_factor + k);
    score.store(s + k);
    if (k + V::kLanes > count)
      for (int64_t i = count; i < k + V::kLanes; i++) s[i] = -kInfinity<A>;
    most = max(most, V::load(s + k));
  }
  const A found = reduce_max(most), old = base;
  base = found > old ? found : old;
  const V zero = V::set1(base == -kInfinity<A> ? A(0) : base);
  V sum = V::zero();
  for (int64_t k = 0; k < count; k += V::kLanes) {
    const V weight = exp(V::load(s + k) - zero);
    sum = sum + weight;
    (weight * V::load(value_factor + k)).store(s + k);
  }
  A shrink[V::kLanes];
  (base == old ? V::set1(A(1)) : exp(V::set1(old) - zero)).store(shrink);
  powers = powers * shrink[0] + reduce_add(sum);
  return shrink[0];
}

template <class A, class T>
void write_quantized_row(const QuantizedAttentionArgs& a, int64_t at, const A* sums, A base, A powers) {
  using V = Vec<A>;
  static_cast<A*>(a.lse)[at] = powers == A(0) ? -kInfinity<A> : A(double(base) + __builtin_log(double(powers)));
  static_cast<A*>(a.stats)[2 * at] = base, static_cast<A*>(a.stats)[2 * at + 1] = powers;
  const V factor = V::set1(powers == A(0) ? A(0) : A(1) / powers);
  for_each_vec<V>(a.value_width, [&](int64_t j, auto part) {
    const V x = load<V>(sums + j, part) * factor;
    store(x, static_cast<A*>(a.total) + at * a.value_width + j, part);
    store(x, static_cast<T*>(a.out) + at * a.value_width + j, part);
  });
}

// Where the part of one split lies: sums, base, powers.
template <class A>
A* quantized_partial(const QuantizedAttentionArgs& a, int64_t split, int64_t at, int64_t width) {
  return static_cast<A*>(a.partial) + (split * a.batch * a.heads * a.queries + at) * width;
}

template <class A>
void forward_tile(const QuantizedScratch<A>& w, const Rows<signed8<A>>& keys, const Rows<signed8<A>>& values,
                  int64_t n) {
  using V = Vec<A>;
  dot_rows<signed8<A>, Dot::plain>(keys, n, w.query, w.scores);
  for (int64_t r = 0; r < n; r++) {
    const A shrink =
        quantized_softmax(w.scores + r * kTile, keys.count, w.key_factor, w.value_factor, w.base[r], w.powers[r]);
    if (shrink == A(1)) continue;
    for_each_vec<V>(values.width, [&](int64_t j, auto part) {
      A* sum = w.sums + r * values.width + j;
      store(load<V>(sum, part) * V::set1(shrink), sum, part);
    });
  }
  add_rows(values, n, w.scores, w.sums);
}

template <class A, class T>
void quantized_forward(const QuantizedAttentionArgs& a, const QuantizedPart& part, void* memory) {
  const QuantizedScratch<A> w(a, memory);
  const int64_t n = part.end - part.begin, width = a.value_width;
  const bool in_lanes = a.queries > kFewRows;  // not by the rows of the part: a group has the bits of its heads
  const int64_t row = in_lanes ? padded<A>(width) : width;
  load_vectors<A, T>(a, part, a.query, a.width, w.query);
  if (in_lanes) pack_transposed(w.query, a.width, n, a.width, w.query_lanes);
  for (int64_t i = 0; i < n * row; i++) w.sums[i] = 0;
  for (int64_t r = 0; r < padded<A>(n); r++) w.base[r] = -kInfinity<A>, w.powers[r] = 0;
  const KeyRun run = keys_of(a, part);
  for (int64_t first = run.first; first < run.last; first += kTile) {
    const auto keys = quantized_tile<A>(a.key, w, part, first, run.last, a.width);
    const auto values = quantized_tile<A>(a.value, w, part, first, run.last, width);
    load_scales(a.key_scale, part, first, keys.count, A(a.scale), w.key_factor);
    load_scales(a.value_scale, part, first, keys.count, A(1), w.value_factor);
    (in_lanes ? forward_tile_in_lanes<A> : forward_tile<A>)(w, keys, values, n);
  }
  for (int64_t r = 0; r < n; r++) {
    const int64_t at = quantized_row(a, part, r).at;
    if (a.splits == 1) {
      write_quantized_row<A, T>(a, at, w.sums + r * row, w.base[r], w.powers[r]);
      continue;
    }
    A* out = quantized_partial<A>(a, part.split, at, width + 2);
    for (int64_t j = 0; j < width; j++) out[j] = w.sums[r * row + j];
    out[width] = w.base[r], out[width + 1] = w.powers[r];
  }
}

template <class A, class T>
void quantized_merge(const QuantizedAttentionArgs& a, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const int64_t width = a.value_width;
  for (int64_t at = begin; at < end; at++) {
    A base = -kInfinity<A>, powers = 0;
    for (int64_t split = 0; split < a.splits; split++) {
      const A other = quantized_partial<A>(a, split, at, width + 2)[width];
      if (!(other <= base)) base = other;
    }
    const V zero = V::set1(base == -kInfinity<A> ? A(0) : base);
    A* joined = quantized_partial<A>(a, 0, at, width + 2);
    for (int64_t split = 0; split < a.splits; split++) {
      const A* part = quantized_partial<A>(a, split, at, width + 2);
      A weight[V::kLanes];
      exp(V::set1(part[width]) - zero).store(weight);
      powers += weight[0] * part[width + 1];
      for_each_vec<V>(width, [&](int64_t j, auto lanes) {
        const V added = load<V>(part + j, lanes) * V::set1(weight[0]);
        store(split ? load<V>(joined + j, lanes) + added : added, joined + j, lanes);
      });
    }
    write_quantized_row<A, T>(a, at, joined, base, powers);
  }
}

// Rows of the task: dout widened, delta = dout . out - dlse. Of a single key the weight is 1 whatever the query: what
// its value and `out` add to ds is left out, to be exactly 0 and not the rounding error of a difference.
template <class A, class T>
void load_gradients(const QuantizedAttentionArgs& a, const QuantizedPart& part, const QuantizedScratch<A>& w,
                    bool single) {
  using V = Vec<A>;
  const int64_t n = part.end - part.begin, width = a.value_width;
  if (a.dout.data)
    load_vectors<A, T>(a, part, a.dout, width, w.dout);
  else
    for (int64_t i = 0; i < n * width; i++) w.dout[i] = 0;
  for (int64_t r = 0; r < n; r++) {
    const QuantizedRow row = quantized_row(a, part, r);
    const A* total = static_cast<const A*>(a.total) + row.at * width;
    V sum = V::zero();
    for_each_vec<V>(width, [&](int64_t j, auto lanes) {
      sum = fma(load<V>(w.dout + r * width + j, lanes), load<V>(total + j, lanes), sum);
    });
    w.delta[r] = single ? A(0) : reduce_add(sum);
    if (a.dlse.data) w.delta[r] -= *quantized_at<A>(a.dlse, part.b, row.head, row.query);
    w.base[r] = static_cast<const A*>(a.stats)[2 * row.at],
    w.powers[r] = static_cast<const A*>(a.stats)[2 * row.at + 1];
  }
}

// Products become ds times what the keys lack.
template <class A>
void backward_tile(const QuantizedScratch<A>& w, const Rows<signed8<A>>& keys, const Rows<signed8<A>>& values,
                   int64_t n) {
  using V = Vec<A>;
  dot_rows<signed8<A>, Dot::plain>(keys, n, w.query, w.scores);
  dot_rows<signed8<A>, Dot::plain>(values, n, w.dout, w.gradients);
  for (int64_t r = 0; r < n; r++) {
    const V base = V::set1(w.base[r]), unit = V::set1(A(1) / w.powers[r]), less = V::set1(w.delta[r]);
    for (int64_t k = 0; k < keys.count; k += V::kLanes) {
      const V factor = V::load(w.key_factor + k);
      const V weight = exp(V::load(w.scores + r * kTile + k) * factor - base) * unit;
      A* gradient = w.gradients + r * kTile + k;
      (weight * (V::load(gradient) * V::load(w.value_factor + k) - less) * factor).store(gradient);
    }
  }
  Rows<signed8<A>> again = keys;
  again.ahead = nullptr;
  add_rows(again, n, w.gradients, w.sums);
}

template <class A, class T>
void quantized_backward(const QuantizedAttentionArgs& a, const QuantizedPart& part, void* memory) {
  const QuantizedScratch<A> w(a, memory);
  const int64_t n = part.end - part.begin;
  const bool in_lanes = a.queries > kFewRows;  // not by the rows of the part: a group has the bits of its heads
  const int64_t row = in_lanes ? padded<A>(a.width) : a.width;
  load_vectors<A, T>(a, part, a.query, a.width, w.query);
  const KeyRun run = keys_of(a, part);
  for (int64_t r = 0; r < padded<A>(n); r++) w.base[r] = 0, w.powers[r] = 1, w.delta[r] = 0;
  load_gradients<A, T>(a, part, w, run.single);
  if (in_lanes) {
    pack_transposed(w.query, a.width, n, a.width, w.query_lanes);
    pack_transposed(w.dout, a.value_width, n, a.value_width, w.dout_lanes);
  }
  for (int64_t i = 0; i < n * row; i++) w.sums[i] = 0;
  for (int64_t first = run.first; first < run.last; first += kTile) {
    const auto keys = quantized_tile<A>(a.key, w, part, first, run.last, a.width);
    const auto values = quantized_tile<A>(a.value, w, part, first, run.last, a.value_width);
    load_scales(a.key_scale, part, first, keys.count, A(a.scale), w.key_factor);
    load_scales(a.value_scale, part, first, keys.count, A(!run.single), w.value_factor);
    (in_lanes ? backward_tile_in_lanes<A> : backward_tile<A>)(w, keys, values, n);
  }
  for (int64_t r = 0; r < n; r++) {
    A* out = quantized_partial<A>(a, part.split, quantized_row(a, part, r).at, a.width);
    for (int64_t j = 0; j < a.width; j++) out[j] = w.sums[r * row + j];
  }
}

template <class A, class T>
void quantized_finish(const QuantizedAttentionArgs& a, int64_t begin, int64_t end) {
  using V = Vec<A>;
  for (int64_t at = begin; at < end; at++)
    for_each_vec<V>(a.width, [&](int64_t j, auto lanes) {
      V sum = load<V>(quantized_partial<A>(a, 0, at, a.width) + j, lanes);
      for (int64_t split = 1; split < a.splits; split++)
        sum = sum + load<V>(quantized_partial<A>(a, split, at, a.width) + j, lanes);
      store(sum, static_cast<T*>(a.dquery) + at * a.width + j, lanes);
    });
}

}  // namespace

#define MK_QUANTIZED_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
const QuantizedAttentionKernels quantized_attention = {
    {quantized_scratch<double>, quantized_scratch<float>, quantized_scratch<float>, quantized_scratch<float>},
    MK_QUANTIZED_TYPES(quantized_forward),
    MK_QUANTIZED_TYPES(quantized_backward),
    MK_QUANTIZED_TYPES(quantized_merge),
    MK_QUANTIZED_TYPES(quantized_finish),
    kQuantizedRows,
};

}  // namespace mk::cpu::MK_LEVEL
