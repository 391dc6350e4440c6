// paged_attention forward: softmax(scale q . k) v over keys that lie in pages.
//
// A task owns a run of keys of one row of the batch and takes all heads through each tile of it, so that a page is read
// from memory once, from its first to its last byte, and a group of query heads finds it in the cache. Bytes moved an
// element of K or V: its size. Everything is summed in the accumulation type; the runs are joined in order.
#pragma once
#include "cpu/generic/attention_lanes.inl.h"
#include "cpu/paged_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kPagedQueries = 16;
constexpr int64_t kPagedAhead = 65536;  // bytes of keys from the tile at work to the one fetched: more is slower again

// Row r = head * queries + query of a task.
template <class A>
struct PagedScratch {
  A *query, *sums, *base, *total, *scores, *beside, *added;
  int32_t* index;
  int64_t used;

  PagedScratch(const PagedArgs& a, void* memory) {
    Carver carver(memory);
    const int64_t rows = a.heads * smaller(kPagedQueries, a.queries), widest = larger(a.key.width, a.value.width);
    query = carver.take<A>(rows * a.key.width);
    sums = carver.take<A>(rows * a.value.width);
    base = carver.take<A>(rows), total = carver.take<A>(rows);
    scores = carver.take<A>(kFewRows * kTile), beside = carver.take<A>(kFewRows * kTile);
    added = carver.take<A>(kFewRows * widest);
    index = carver.take<int32_t>(kTile);
    for (int64_t i = 0; memory && i < kTile; i++) index[i] = int32_t(i);
    used = carver.used();
  }
};

// What the keys of a tile lie in: `count` slots of one page, from place `at` of the tile on.
template <class T>
struct Piece {
  Rows<T> key, value;
  int64_t at;
};

template <class T>
MK_INLINE Rows<T> piece_rows(const PagedArgs& a, const PagedRows& t, const int32_t* index, int64_t b, int64_t h,
                             int64_t key, int64_t count) {
  const auto slot = [&](int64_t k) {
    return static_cast<const T*>(t.data) + a.pages[b * a.most + k / a.slots] * t.page + k % a.slots * t.slot +
           h * t.head;
  };
  const int64_t keys = kPagedAhead / int64_t(sizeof(T)) / (a.key_heads * (t.width + 1)) / 16 * 16;
  const int64_t later = key + larger(keys, 16);
  const bool more = later + count <= a.lengths[b] && later % a.slots + count <= a.slots;
  return {slot(key), t.slot, index, count, t.width, more ? slot(later) : nullptr, true};
}

template <class T>
int64_t cut_tile(const PagedArgs& a, const int32_t* index, int64_t b, int64_t h, int64_t first, int64_t last,
                 Piece<T>* pieces) {
  int64_t n = 0;
  for (int64_t key = first; key < last; n++) {
    const int64_t count = smaller(a.slots - key % a.slots, last - key);
    pieces[n] = {piece_rows<T>(a, a.key, index, b, h, key, count), piece_rows<T>(a, a.value, index, b, h, key, count),
                 key - first};
    key += count;
  }
  return n;
}

// Products with the keys of a piece, at their places in the rows of scores. Whole vectors are written, so those that
// begin amid one take a way round: they would reach the next row.
template <class A, class T>
MK_INLINE void piece_scores(const Piece<T>& piece, int64_t n, const A* query, A* beside, A* scores) {
  if (piece.at % kLanes<A> == 0) return dot_rows<T, Dot::plain>(piece.key, n, query, scores + piece.at);
  dot_rows<T, Dot::plain>(piece.key, n, query, beside);
  for (int64_t r = 0; r < n; r++)
    for (int64_t i = 0; i < piece.key.count; i++) scores[r * kTile + piece.at + i] = beside[r * kTile + i];
}

// sums[r] += weights of row r times the values of the tile, of which a weight of 0 leaves out whatever they hold.
template <class A, class T>
void add_pieces(const Piece<T>* pieces, int64_t count, int64_t n, int64_t width, const A* weights, A* added, A* sums) {
  using V = Vec<A>;
  for (int64_t i = 0; i < n * width; i++) added[i] = 0;
  for (int64_t p = 0; p < count; p++) add_rows(pieces[p].value, n, weights + pieces[p].at, added);
  V least = V::zero();  // x - x is NaN where x is not finite
  for_each_vec<V>(n * width, [&](int64_t j, auto part) {
    const V x = load<V>(added + j, part);
    least = least + (x - x);
  });
  if (!(reduce_add(least) == A(0)))
    for (int64_t r = 0; r < n; r++) {
      A* to = added + r * width;
      for (int64_t j = 0; j < width; j++) to[j] = 0;
      for (int64_t p = 0; p < count; p++)
        for (int64_t i = 0; i < pieces[p].value.count; i++) {
          const A weight = weights[r * kTile + pieces[p].at + i];
          if (weight == A(0)) continue;
          for_each_vec<V>(width, [&](int64_t j, auto part) {
            const V x = load<V>(pieces[p].value.row(i) + j, part);
            store(fma(V::set1(weight), x + (x - x), load<V>(to + j, part)), to + j, part);
          });
        }
    }
  for_each_vec<V>(n * width, [&](int64_t j, auto part) {
    store(load<V>(sums + j, part) + load<V>(added + j, part), sums + j, part);
  });
}

// Rows [0, n) of the group from `row` on against one tile.
template <class A, class T>
void paged_tile(const PagedArgs& a, const PagedScratch<A>& w, const Piece<T>* pieces, int64_t count, int64_t b,
                int64_t row, int64_t n, int64_t queries, int64_t begin, int64_t first, int64_t last) {
  using V = Vec<A>;
  const int64_t keys = last - first, width = a.value.width;
  for (int64_t p = 0; p < count; p++) piece_scores(pieces[p], n, w.query + row * a.key.width, w.beside, w.scores);
  for (int64_t r = 0; r < n; r++) {
    A *s = w.scores + r * kTile, factor = A(a.scale);
    const int64_t stands = a.lengths[b] - a.queries + begin + (row + r) % queries;
    const int64_t seen = a.causal ? smaller(larger(stands + 1 - first, 0), keys) : keys;
    if (!(a.scale > 0)) {  // the maximum of the plain products would not be that of the scores
      for (int64_t k = 0; k < keys; k++) s[k] *= factor;
      factor = 1;
    }
    mask_scores<A>(s, {0, keys}, {0, seen}, nullptr, factor);
    const A shrink = softmax_row<A>(s, {0, keys}, factor, w.base[row + r], w.total[row + r], nullptr);
    if (shrink == A(1)) continue;
    for_each_vec<V>(width, [&](int64_t j, auto part) {
      A* sum = w.sums + (row + r) * width + j;
      store(load<V>(sum, part) * V::set1(shrink), sum, part);
    });
  }
  add_pieces<A>(pieces, count, n, width, w.scores, w.added, w.sums + row * width);
}

template <class A>
struct PagedPart {
  A *sums, *base, *total;
  PagedPart(const PagedArgs& a, int64_t b, int64_t run) {
    const int64_t rows = a.heads * a.queries;
    sums = static_cast<A*>(a.partial) + (a.partial_at[b] + run) * rows * (a.value.width + 2);
    base = sums + rows * a.value.width, total = base + rows;
  }
};

template <class A, class T>
void paged_write(const PagedArgs& a, int64_t b, int64_t row, const A* sums, A base, A total) {
  AttentionArgs to{};
  to.out_data = a.out, to.lse_data = a.lse, to.stats_data = a.stats, to.value_width = a.value.width;
  write_row<A, T>(to, b * a.heads * a.queries + row, sums, base, total);
}

template <class A, class T>
void paged_forward(const PagedArgs& a, int64_t b, int64_t run, int64_t begin, int64_t end, void* memory) {
  const PagedScratch<A> w(a, memory);
  const int64_t queries = end - begin, group = a.heads / a.key_heads * queries, rows = a.heads * queries;
  const int64_t width = a.value.width, start = run * a.run_keys, stop = smaller(start + a.run_keys, a.lengths[b]);
  for (int64_t h = 0; h < a.heads; h++)
    widen_rows(static_cast<const T*>(a.query) + b * a.query_b + h * a.query_h + begin * a.query_q, a.query_q, queries,
               a.key.width, w.query + h * queries * a.key.width);
  for (int64_t i = 0; i < rows * width; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < rows; i++) w.base[i] = -kInfinity<A>, w.total[i] = 0;
  Piece<T> pieces[kTile];
  for (int64_t first = start; first < stop; first += kTile) {
    const int64_t last = smaller(first + kTile, stop);
    for (int64_t h = 0; h < a.key_heads; h++) {
      int64_t count = cut_tile<T>(a, w.index, b, h, first, last, pieces);
      for (int64_t r = 0; r < group; r += kFewRows) {
        const int64_t n = smaller(kFewRows, group - r);
        paged_tile<A, T>(a, w, pieces, count, b, h * group + r, n, queries, begin, first, last);
        for (int64_t p = 0; p < count; p++) pieces[p].key.ahead = pieces[p].value.ahead = nullptr;
      }
    }
  }
  const bool whole = a.lengths[b] <= a.run_keys;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = i / queries * a.queries + begin + i % queries;
    if (whole) {
      paged_write<A, T>(a, b, row, w.sums + i * width, w.base[i], w.total[i]);
      continue;
    }
    const PagedPart<A> out(a, b, run);
    for (int64_t j = 0; j < width; j++) out.sums[row * width + j] = w.sums[i * width + j];
    out.base[row] = w.base[i], out.total[row] = w.total[i];
  }
}

template <class A, class T>
void paged_merge(const PagedArgs& a, int64_t b, int64_t runs) {
  using V = Vec<A>;
  const int64_t width = a.value.width;
  for (int64_t row = 0; row < a.heads * a.queries; row++) {
    A* joined = PagedPart<A>(a, b, 0).sums + row * width;
    A base = -kInfinity<A>, total = 0;
    for (int64_t run = 0; run < runs; run++) {
      const A other = PagedPart<A>(a, b, run).base[row];
      if (!(other <= base)) base = other;
    }
    for (int64_t run = 0; run < runs; run++) {
      const PagedPart<A> part(a, b, run);
      A weight[kLanes<A>];
      const A zero_point = base == -kInfinity<A> ? A(0) : base;
      power_of(V::set1(part.base[row]), V::set1(A(1)), V::set1(zero_point)).store(weight);
      total += weight[0] * part.total[row];
      for_each_vec<V>(width, [&](int64_t j, auto tail) {
        const V added = load<V>(part.sums + row * width + j, tail) * V::set1(weight[0]);
        store(run ? load<V>(joined + j, tail) + added : added, joined + j, tail);
      });
    }
    paged_write<A, T>(a, b, row, joined, base, total);
  }
}

template <class A>
int64_t paged_scratch(const PagedArgs& a) {
  return PagedScratch<A>(a, nullptr).used;
}

}  // namespace

#define MK_PAGED_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
const PagedKernels paged_attention = {
    {paged_scratch<double>, paged_scratch<float>, paged_scratch<float>, paged_scratch<float>},
    MK_PAGED_TYPES(paged_forward),
    MK_PAGED_TYPES(paged_merge),
    kPagedQueries};

}  // namespace mk::cpu::MK_LEVEL
