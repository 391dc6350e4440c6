// Attention of few queries over many keys: keys and values are read once, in place, a tile of rows at a time.
//
// Forward and backward of these shapes wait for the memory: nothing is packed, and the gradients of keys and values
// are written once, as their tile passes. Bytes moved an element of K or V: its size, and in backward its gradient's.
#pragma once
#include "cpu/generic/attention_backward.inl.h"
#include "cpu/generic/rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Numbers of query i of head h lie at row (h - first head) * queries + i; sums and vectors are packed by the width.
template <class A>
struct FewScratch {
  A *query, *dout, *sums, *piece, *base, *total, *unit, *scores, *gradients, *bias, *kept;
  int32_t* index;
  int64_t used;

  FewScratch(const AttentionArgs& a, void* memory) {
    Carver carver(memory);
    const int64_t widest = larger(a.width, a.value_width);
    query = carver.take<A>(kFewRows * a.width);
    dout = carver.take<A>(kFewRows * a.value_width);
    sums = carver.take<A>(kFewRows * widest), piece = carver.take<A>(kFewRows * widest);
    base = carver.take<A>(kFewRows), total = carver.take<A>(kFewRows), unit = carver.take<A>(kFewRows);
    scores = carver.take<A>(kFewRows * kTile), gradients = carver.take<A>(kFewRows * kTile);
    bias = carver.take<A>(kTile), kept = carver.take<A>(kTile);
    index = carver.take<int32_t>(kTile);
    for (int64_t i = 0; memory && i < kTile; i++) index[i] = int32_t(i);
    used = carver.used();
  }
};

// Numbers of the tile's rows and the queries: of row i and query r at data[i * row + r * query].
template <class A>
struct Weights {
  const A* data;
  int64_t row, query;
  MK_INLINE A operator()(int64_t i, int64_t r) const { return data[i * row + r * query]; }
};

// sums[r] += piece[r], which holds the weights of query r times the rows of the tile; where it is not finite it is made
// again, as a weight of 0 leaves out whatever its row holds. Both have rows `row` apart.
template <class A, class T>
void join_tile(const Rows<T>& rows, int64_t n, Weights<A> weights, A* piece, A* sums, int64_t row) {
  using V = Vec<A>;
  for (int64_t r = 0; r < n; r++) {
    A *from = piece + r * row, *to = sums + r * row;
    V least = V::zero();  // x - x is NaN where x is not finite
    for_each_vec<V>(rows.width, [&](int64_t j, auto part) {
      const V x = load<V>(from + j, part);
      least = least + (x - x);
    });
    if (!(reduce_add(least) == A(0))) {
      for (int64_t j = 0; j < rows.width; j++) from[j] = 0;
      for (int64_t i = 0; i < rows.count; i++) {
        const A one = weights(i, r);
        if (one == A(0)) continue;
        const V weight = V::set1(one);
        for_each_vec<V>(rows.width, [&](int64_t j, auto part) {
          const V x = load<V>(rows.row(i) + j, part);
          store(fma(weight, x + (x - x), load<V>(from + j, part)), from + j, part);
        });
      }
    }
    for_each_vec<V>(rows.width, [&](int64_t j, auto part) {
      store(load<V>(to + j, part) + load<V>(from + j, part), to + j, part);
    });
  }
}

// sums[r] += weights of row r times the rows of the tile.
template <class A, class T>
void add_tile(const Rows<T>& rows, int64_t n, const A* weights, A* piece, A* sums) {
  for (int64_t i = 0; i < n * rows.width; i++) piece[i] = 0;
  add_rows(rows, n, weights, piece);
  join_tile<A>(rows, n, {weights, 1, kTile}, piece, sums, rows.width);
}

// Scores of one query against the tile at `first`, ready for the softmax; returns the factor they still lack.
template <class A, class T>
A few_scores(const AttentionArgs& a, const FewScratch<A>& w, int64_t b, int64_t h, int64_t query, int64_t first,
             int64_t count, A* s, A* slopes = nullptr) {
  const bool biased = needs_bias(a);
  const A scale = factor_after_cap<A>(a);
  if (a.softcap > 0) cap_scores(a, s, 0, padded<A>(count), slopes);
  const Range all = seen_by(a, query), block = {0, count};
  Range seen = {smaller(larger(all.first - first, 0), count), smaller(larger(all.last - first, 0), count)};
  if (seen.first >= seen.last) seen = {count, count};
  if (a.mask)
    load_mask<A, T>(a, b, h, query, first, 0, count, w.bias);
  else if (biased)
    for (int64_t k = 0; k < kTile; k++) w.bias[k] = 0;
  mask_scores(s, block, seen, biased ? w.bias : nullptr, scale);
  if (a.seed) load_kept<A>(a, b, h, query, first, 0, count, w.kept);
  return biased ? A(1) : scale;
}

template <class A, class T>
Rows<T> tile_of_rows(const AttentionTensor& t, const FewScratch<A>& w, int64_t b, int64_t h, int64_t first,
                     int64_t count, int64_t width, bool more) {
  const T* rows = rows_of<T>(t, b, h, first);
  return {rows, t.row, w.index, count, width, more ? rows + kAhead * kTile * t.row : nullptr, true};
}

template <class A, class T>
void few_forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                 void* memory) {
  using V = Vec<A>;
  const FewScratch<A> w(a, memory);
  const int64_t n = end - begin, shared = h / (a.heads / a.key_heads), width = a.value_width;
  widen_rows(rows_of<T>(a.query, b, h, begin), a.query.row, n, a.width, w.query);
  for (int64_t i = 0; i < n * width; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < n; i++) w.base[i] = -kInfinity<A>, w.total[i] = 0;
  const int64_t start = split * a.split_keys, stop = smaller(start + a.split_keys, a.seen_keys);
  const Range seen = seen_by_block(a, begin, end, start, stop);
  for (int64_t first = start + seen.first / kTile * kTile; first < start + seen.last; first += kTile) {
    const int64_t count = smaller(kTile, stop - first);
    const bool more = first + (kAhead + 1) * kTile <= stop;
    dot_rows<T, Dot::plain>(tile_of_rows<A, T>(a.key, w, b, shared, first, count, a.width, more), n, w.query, w.scores);
    const Rows<T> values = tile_of_rows<A, T>(a.value, w, b, shared, first, count, width, more);
    for (int64_t i = 0; i < n; i++) {
      values.fetch_early(i);
      A* s = w.scores + i * kTile;
      const A factor = few_scores<A, T>(a, w, b, h, begin + i, first, count, s);
      const A shrink = softmax_row(s, {0, count}, factor, w.base[i], w.total[i], a.seed ? w.kept : nullptr);
      if (shrink == A(1)) continue;
      for_each_vec<V>(width, [&](int64_t j, auto part) {
        A* sum = w.sums + i * width + j;
        store(load<V>(sum, part) * V::set1(shrink), sum, part);
      });
    }
    add_tile(values, n, w.scores, w.piece, w.sums);
  }
  for (int64_t i = 0; i < n; i++) {
    if (a.splits == 1) {
      write_row<A, T>(a, row_index(a, b, h, begin + i), w.sums + i * width, w.base[i], w.total[i]);
      continue;
    }
    const Partial<A> out(a, b, h, split);
    for (int64_t j = 0; j < width; j++) out.sums[(begin + i) * padded<A>(width) + j] = w.sums[i * width + j];
    out.base[begin + i] = w.base[i], out.total[begin + i] = w.total[i];
  }
}

// Few rows over keys of which no query sees only one block. Whatever gradients are wanted: the path decides their bits.
// Those of a mask are left to the blocks.
MK_INLINE bool is_few(const AttentionArgs& a) {
  if (a.heads / a.key_heads * a.queries > kFewRows || !a.dout.data || (a.mask && !a.mask_boolean)) return false;
  for (int64_t query = 0; query < a.queries; query++)
    if (in_one_block(a, seen_by(a, query))) return false;
  return true;
}

template <class A, class T>
void few_gradients(const AttentionArgs& a, const AttentionPart& part, const FewScratch<A>& w, int64_t first,
                   int64_t count) {
  const int64_t queries = part.end - part.begin, n = a.heads / a.key_heads * queries;
  for (int64_t r = 0; r < n; r++) {
    const int64_t h = part.h * (n / queries) + r / queries, query = part.begin + r % queries;
    A *s = w.scores + r * kTile, *g = w.gradients + r * kTile;
    A slopes[kTile];
    const A factor = few_scores<A, T>(a, w, part.b, h, query, first, count, s, slopes);
    gradient_row(s, g, {0, count}, factor, w.base[r], w.total[r], a.seed ? w.kept : nullptr, w.unit[r]);
    if (a.softcap > 0) slope_gradients(g, slopes, 0, padded<A>(count));
  }
}

// out row i = factor * sum_r weights(i, r) vector r, the sum before the factor, rounded once. Vectors lie `vector_row`
// apart.
template <class A, class T>
void write_tile(int64_t n, int64_t count, int64_t width, Weights<A> weights, const A* vectors, int64_t vector_row,
                A factor, T* out, bool stream) {
  using V = Vec<A>;
  const auto columns = [&](int64_t i, int64_t j, auto part, auto rows, auto vecs) {
    constexpr int R = decltype(rows)::value, N = decltype(vecs)::value;
    V sum[R][N];
    for (int m = 0; m < R; m++)
      for (int l = 0; l < N; l++) sum[m][l] = V::zero();
    for (int64_t r = 0; r < n; r++) {
      V x[N];
      for (int l = 0; l < N; l++) x[l] = load<V>(vectors + r * vector_row + j + l * V::kLanes, part);
      for (int m = 0; m < R; m++) {
        const V weight = V::set1(weights(i + m, r));
        for (int l = 0; l < N; l++) sum[m][l] = fma(weight, x[l], sum[m][l]);
      }
    }
    for (int m = 0; m < R; m++)
      for (int l = 0; l < N; l++) {
        const V x = sum[m][l] * V::set1(factor);
        T* to = out + (i + m) * width + j + l * V::kLanes;
        if constexpr (sizeof(T) == sizeof(A))
          if (stream) {
            x.stream(to);
            continue;
          }
        store(x, to, part);
      }
  };
  const auto rows_at = [&](int64_t i, auto rows) {
    int64_t j = 0;
    for (; j + 4 * V::kLanes <= width; j += 4 * V::kLanes) columns(i, j, Full{}, rows, Count<4>{});
    for (; j + V::kLanes <= width; j += V::kLanes) columns(i, j, Full{}, rows, Count<1>{});
    if (j < width) columns(i, j, Tail{width - j}, rows, Count<1>{});
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) rows_at(i, Count<4>{});
  for (; i < count; i++) rows_at(i, Count<1>{});
}

template <class A, class T>
void few_backward(const AttentionArgs& a, const AttentionPart& part, void* memory) {
  const FewScratch<A> w(a, memory);
  const int64_t queries = part.end - part.begin, group = a.heads / a.key_heads, n = group * queries;
  for (int64_t g = 0; g < group; g++) {
    const int64_t h = part.h * group + g, row = row_index(a, part.b, h, part.begin), to = g * queries;
    widen_rows(rows_of<T>(a.query, part.b, h, part.begin), a.query.row, queries, a.width, w.query + to * a.width);
    widen_rows(rows_of<T>(a.dout, part.b, h, part.begin), a.dout.row, queries, a.value_width,
               w.dout + to * a.value_width);
    for (int64_t i = 0; i < queries; i++) {
      w.base[to + i] = static_cast<const A*>(a.rows_base)[row + i];
      w.unit[to + i] = static_cast<const A*>(a.rows_unit)[row + i];
      w.total[to + i] = static_cast<const A*>(a.rows_delta)[row + i];
    }
  }
  for (int64_t i = 0; i < n * a.width; i++) w.sums[i] = 0;
  const int64_t row = (part.b * a.key_heads + part.h) * a.keys, stop = smaller(part.last, a.seen_keys);
  const int64_t all_rows = a.batch * a.key_heads * a.keys;
  const bool stream_key = past_caches<A, T>(a.dkey, all_rows, a.width);
  const bool stream_value = past_caches<A, T>(a.dvalue, all_rows, a.value_width);
  for (int64_t first = part.first; first < stop; first += kTile) {
    const int64_t count = smaller(kTile, stop - first);
    const bool more = first + (kAhead + 1) * kTile <= stop;
    Rows<T> keys = tile_of_rows<A, T>(a.key, w, part.b, part.h, first, count, a.width, more);
    const Rows<T> values = tile_of_rows<A, T>(a.value, w, part.b, part.h, first, count, a.value_width, more);
    dot_rows<T, Dot::plain>(keys, n, w.query, w.scores);
    dot_rows<T, Dot::plain>(values, n, w.dout, w.gradients);
    few_gradients<A, T>(a, part, w, first, count);
    if (part.dkv && a.dvalue)
      write_tile<A>(n, count, a.value_width, {w.scores, 1, kTile}, w.dout, a.value_width, A(1),
                    static_cast<T*>(a.dvalue) + (row + first) * a.value_width, stream_value);
    if (part.dkv && a.dkey)
      write_tile<A>(n, count, a.width, {w.gradients, 1, kTile}, w.query, a.width, A(a.scale),
                    static_cast<T*>(a.dkey) + (row + first) * a.width, stream_key);
    if (!part.dquery) continue;
    keys.ahead = nullptr;
    add_tile(keys, n, w.gradients, w.piece, w.sums);
  }
  for (int64_t r = 0; part.dquery && r < n; r++) {
    const int64_t at = row_index(a, part.b, part.h * group + r / queries, part.begin + r % queries);
    A* sums = static_cast<A*>(a.dquery_sums) + (part.run * a.batch * a.heads * a.queries + at) * padded<A>(a.width);
    for (int64_t j = 0; j < a.width; j++) sums[j] = w.sums[r * a.width + j];
  }
}

// Few queries whose gradients are left to the blocks: products summed in another order.
template <class A, class T>
double restate_beyond(const AttentionArgs& a) {
  return a.heads && a.queries <= kFewRows && (a.lengths || !is_few(a)) ? 8 : __builtin_inf();
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
