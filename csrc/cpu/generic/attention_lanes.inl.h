// Attention of up to 64 queries over many keys: queries lie in the lanes of vectors, keys and values are read once,
// where they lie, a tile of rows at a time.
//
//   scores[key][query] = key . query: each element of a key times a vector of queries, so that nothing is transposed,
//   and the softmax of all queries of a vector runs in its lanes, without a sum across them
//
// A task owns a run of keys of a head. Bytes moved an element of K or V: its size, and in backward its gradient's. The
// products are summed in the order of the blocks (attention_forward.inl.h), so their scores are the same numbers.
#pragma once
#include "cpu/generic/attention_few.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Numbers of a query lie at its lane; those of a key of the tile in rows of `lanes`. Vectors are rows of query_row and
// value_row, padded.
template <class A>
struct LaneScratch {
  A *query_lanes, *dout_lanes, *query, *dout, *sums, *piece, *base, *total, *unit, *scores, *gradients, *room;
  int32_t* index;
  int64_t query_row, value_row, used;

  LaneScratch(const AttentionArgs& a, void* memory)
      : query_row(padded<A>(a.width)), value_row(padded<A>(a.value_width)) {
    Carver carver(memory);
    const int64_t widest = larger(query_row, value_row);
    query_lanes = carver.take<A>(kLaneQueries * a.width), dout_lanes = carver.take<A>(kLaneQueries * a.value_width);
    query = carver.take<A>(kLaneQueries * query_row), dout = carver.take<A>(kLaneQueries * value_row);
    sums = carver.take<A>(kLaneQueries * widest), piece = carver.take<A>(kLaneQueries * widest);
    base = carver.take<A>(kLaneQueries), total = carver.take<A>(kLaneQueries), unit = carver.take<A>(kLaneQueries);
    scores = carver.take<A>(kTile * kLaneQueries), gradients = carver.take<A>(kTile * kLaneQueries);
    room = carver.take<A>(kTile * widest);
    index = carver.take<int32_t>(kTile);
    for (int64_t i = 0; memory && i < kTile; i++) index[i] = int32_t(i);
    used = carver.used();
  }
};

// A tile of keys or values: its rows where they lie, the same as an operand of products, and what is fetched meanwhile.
template <class A, class T>
struct LaneTile {
  Rows<T> rows;
  Operand<A> at;
  const T* ahead = nullptr;

  LaneTile(const AttentionTensor& t, const int32_t* index, int64_t b, int64_t h, int64_t first, int64_t stop,
           int64_t width, A* room)
      : rows{rows_of<T>(t, b, h, first), t.row, index, smaller(kTile, stop - first), width, nullptr, true},
        at(operand<A, T>(t, b, h, first, rows.count, width, room)) {
    // Between rows that lie apart are those of other heads, which nobody here reads.
    if (t.row == width && first + (kAhead + 1) * kTile <= stop) {
      ahead = rows.base + kAhead * kTile * t.row;
      if (sizeof(T) == sizeof(A)) touch_pages(ahead + kTile * t.row, bytes());  // else the work takes longer
    }
  }
  int64_t bytes() const { return rows.count * rows.width * int64_t(sizeof(T)); }
};

// out[i][lane] = row i . vector of the lane.
template <class A, class T>
void lane_products(const LaneTile<A, T>& tile, const A* vectors, int64_t lanes, A* out) {
  product<A>({tile.at.at, tile.at.row, 1, vectors, tile.rows.width, 0, out, lanes, 0, tile.ahead, tile.bytes()},
             tile.rows.count, lanes, 0, lanes, tile.rows.width, nullptr, false);
}

// sums of each query += weights[key][lane of the query] times the rows of the tile.
template <class A, class T>
void add_lanes(const LaneTile<A, T>& tile, int64_t n, const A* weights, int64_t lanes, A* piece, A* sums, int64_t row) {
  const int64_t width = tile.rows.width, count = tile.rows.count;
  product<A>({weights, 1, lanes, tile.at.at, 0, 0, piece, row, tile.at.row, tile.ahead, tile.bytes()}, n, width, 0,
             width, count, nullptr, false);
  join_tile<A>(tile.rows, n, {weights, lanes, 1}, piece, sums, row);
}

// Scores that a query does not see by its position become -inf. Queries `begin` to `end` of each head of a group.
template <class A>
void hide_lanes(const AttentionArgs& a, int64_t begin, int64_t end, int64_t group, int64_t first, int64_t count,
                int64_t lanes, A* scores) {
  if (seen_by(a, end - 1).first <= first && seen_by(a, begin).last >= first + count) return;
  for (int64_t r = 0; r < group * (end - begin); r++) {
    const Range seen = seen_by(a, begin + r % (end - begin));
    for (int64_t i = 0; i < count; i++)
      if (first + i < seen.first || first + i >= seen.last) scores[i * lanes + r] = -kInfinity<A>;
  }
}

// Scores become weights relative to the new base; shrink: what the older sums must be multiplied by. Returns whether
// any is not 1.
template <class A>
bool lane_softmax(A* scores, int64_t count, int64_t lanes, A factor, A* base, A* total, A* shrink) {
  using V = Vec<A>;
  const V f = V::set1(factor), lowest = V::set1(-kInfinity<A>);
  V change = V::zero();
  for (int64_t j = 0; j < lanes; j += V::kLanes) {
    V most = lowest, other = lowest, sum = V::zero();
    A* s = scores + j;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      most = max(most, V::load(s + i * lanes));
      other = max(other, V::load(s + (i + 1) * lanes));
    }
    if (i < count) most = max(most, V::load(s + i * lanes));
    const V old = V::load(base + j), top = max(max(most, other) * f, old);  // `old` for NaN
    const V zero = select(top == lowest, V::zero(), top);
    for (i = 0; i < count; i++) {
      const V weight = power_of(V::load(s + i * lanes), f, zero);
      sum = sum + weight;
      weight.store(s + i * lanes);
    }
    // power(0) is not exactly 1, and short blocks would add that up
    const V less = select(top == old, V::set1(1), power_of(old, V::set1(1), zero));
    (V::load(total + j) * less + sum).store(total + j);
    top.store(base + j), less.store(shrink + j);
    change = change + (V::set1(1) - less);
  }
  return !(reduce_add(change) == A(0));
}

template <class A, class T>
void lanes_forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                   void* memory) {
  using V = Vec<A>;
  const LaneScratch<A> w(a, memory);
  const int64_t n = end - begin, lanes = padded<A>(n), shared = h / (a.heads / a.key_heads), row = w.value_row;
  pack_transposed(rows_of<T>(a.query, b, h, begin), a.query.row, n, a.width, w.query_lanes);
  for (int64_t i = 0; i < n * row; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < lanes; i++) w.base[i] = -kInfinity<A>, w.total[i] = 0;
  const int64_t start = split * a.split_keys, stop = smaller(start + a.split_keys, a.seen_keys);
  const Range seen = seen_by_block(a, begin, end, start, stop);
  for (int64_t first = start + seen.first / kTile * kTile; first < start + seen.last; first += kTile) {
    const LaneTile<A, T> keys(a.key, w.index, b, shared, first, stop, a.width, w.room);
    lane_products(keys, w.query_lanes, lanes, w.scores);
    hide_lanes(a, begin, end, 1, first, keys.rows.count, lanes, w.scores);
    if (lane_softmax(w.scores, keys.rows.count, lanes, A(a.scale), w.base, w.total, w.unit))
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < row; j += V::kLanes) {
          A* sum = w.sums + i * row + j;
          (V::load(sum) * V::set1(w.unit[i])).store(sum);
        }
    const LaneTile<A, T> values(a.value, w.index, b, shared, first, stop, a.value_width, w.room);
    add_lanes(values, n, w.scores, lanes, w.piece, w.sums, row);
  }
  if (a.splits == 1) {
    for (int64_t i = 0; i < n; i++)
      write_row<A, T>(a, row_index(a, b, h, begin + i), w.sums + i * row, w.base[i], w.total[i]);
    return;
  }
  const Partial<A> out(a, b, h, split);
  for (int64_t i = 0; i < n * row; i++) out.sums[begin * row + i] = w.sums[i];
  for (int64_t i = 0; i < n; i++) out.base[begin + i] = w.base[i], out.total[begin + i] = w.total[i];
}

// Whether all that backward sums is in lanes, whichever gradients are wanted: the path decides their bits. Queries that
// see only one block of keys are left to the blocks, and so are those of attention_few.inl.h.
MK_INLINE bool is_in_lanes(const AttentionArgs& a) {
  if (!fits_lanes(a, a.heads / a.key_heads * a.queries) || !a.dout.data) return false;
  for (int64_t query = 0; query < a.queries; query++)
    if (in_one_block(a, seen_by(a, query))) return false;
  return true;
}

template <class A, class T>
void load_lanes(const AttentionArgs& a, const AttentionPart& part, const LaneScratch<A>& w, int64_t n, int64_t lanes) {
  const int64_t queries = part.end - part.begin;
  for (int64_t i = 0; i < lanes; i++) w.base[i] = kInfinity<A>, w.unit[i] = 0, w.total[i] = 0;
  for (int64_t r = 0; r < n; r += queries) {
    const int64_t h = part.h * (n / queries) + r / queries, row = row_index(a, part.b, h, part.begin);
    pack_plain(rows_of<T>(a.query, part.b, h, part.begin), a.query.row, queries, a.width, w.query + r * w.query_row);
    pack_plain(rows_of<T>(a.dout, part.b, h, part.begin), a.dout.row, queries, a.value_width, w.dout + r * w.value_row);
    for (int64_t i = 0; i < queries; i++) {
      w.base[r + i] = static_cast<const A*>(a.rows_base)[row + i];
      w.unit[r + i] = static_cast<const A*>(a.rows_unit)[row + i];
      w.total[r + i] = static_cast<const A*>(a.rows_delta)[row + i];
    }
  }
  pack_transposed(w.query, w.query_row, n, a.width, w.query_lanes);
  pack_transposed(w.dout, w.value_row, n, a.value_width, w.dout_lanes);
}

// Products of keys and of values become weights and ds.
template <class A>
void lane_gradients(const LaneScratch<A>& w, int64_t count, int64_t lanes, A factor) {
  using V = Vec<A>;
  const V f = V::set1(factor);
  for (int64_t j = 0; j < lanes; j += V::kLanes) {
    const V base = V::load(w.base + j), unit = V::load(w.unit + j), delta = V::load(w.total + j);
    for (int64_t i = j; i < count * lanes; i += lanes) {
      const V weight = power_of(V::load(w.scores + i), f, base) * unit;
      const V gradient = weight * (V::load(w.gradients + i) - delta);
      select(weight == V::zero(), V::zero(), gradient).store(w.gradients + i);  // 0 also where the value is not finite
      weight.store(w.scores + i);
    }
  }
}

template <class A, class T>
void lanes_backward(const AttentionArgs& a, const AttentionPart& part, void* memory) {
  const LaneScratch<A> w(a, memory);
  const int64_t queries = part.end - part.begin, group = a.heads / a.key_heads, n = group * queries;
  const int64_t lanes = padded<A>(n), row = (part.b * a.key_heads + part.h) * a.keys;
  load_lanes<A, T>(a, part, w, n, lanes);
  for (int64_t i = 0; i < n * w.query_row; i++) w.sums[i] = 0;
  const int64_t stop = smaller(part.last, a.seen_keys);
  const int64_t all_rows = a.batch * a.key_heads * a.keys;
  const bool stream_key = past_caches<A, T>(a.dkey, all_rows, a.width);
  const bool stream_value = past_caches<A, T>(a.dvalue, all_rows, a.value_width);
  for (int64_t first = part.first; first < stop; first += kTile) {
    // The values first: the room of both is the keys' from then on.
    lane_products(LaneTile<A, T>(a.value, w.index, part.b, part.h, first, stop, a.value_width, w.room), w.dout_lanes,
                  lanes, w.gradients);
    LaneTile<A, T> keys(a.key, w.index, part.b, part.h, first, stop, a.width, w.room);
    lane_products(keys, w.query_lanes, lanes, w.scores);
    const int64_t count = keys.rows.count;
    hide_lanes(a, part.begin, part.end, group, first, count, lanes, w.scores);
    lane_gradients(w, count, lanes, A(a.scale));
    if (part.dkv && a.dvalue)
      write_tile<A>(n, count, a.value_width, {w.scores, lanes, 1}, w.dout, w.value_row, A(1),
                    static_cast<T*>(a.dvalue) + (row + first) * a.value_width, stream_value);
    if (part.dkv && a.dkey)
      write_tile<A>(n, count, a.width, {w.gradients, lanes, 1}, w.query, w.query_row, A(a.scale),
                    static_cast<T*>(a.dkey) + (row + first) * a.width, stream_key);
    keys.ahead = nullptr;
    if (part.dquery) add_lanes(keys, n, w.gradients, lanes, w.piece, w.sums, w.query_row);
  }
  for (int64_t r = 0; part.dquery && r < n; r++) {
    const int64_t at = row_index(a, part.b, part.h * group + r / queries, part.begin + r % queries);
    A* sums = static_cast<A*>(a.dquery_sums) + (part.run * a.batch * a.heads * a.queries + at) * w.query_row;
    for (int64_t j = 0; j < a.width; j++) sums[j] = w.sums[r * w.query_row + j];
  }
}

// Of the tasks that take few queries.
template <class A>
int64_t few_scratch(const AttentionArgs& a) {
  return larger(FewScratch<A>(a, nullptr).used, LaneScratch<A>(a, nullptr).used);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
