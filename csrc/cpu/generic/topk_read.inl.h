// topk_read: the k rows of the largest score of each query, softmax over them, the weighted sum of their values.
//
// A search owns up to kTopkQueries queries and a run of rows. Scores come in tiles of rows x queries (queries packed as
// panels, a query a lane; rows as they lie in memory), or, for few queries, as dot products along whole rows. A vector
// of scores is compared with the thresholds of its queries, and only what passes is touched: it joins the query's
// pairs, which are cut down to the k best, and the threshold raised, whenever they fill. No score is kept otherwise. A
// search starts from just below what a finished one of other rows has shown to be reached.
// The choice is exact and has one result however the rows were split. Bytes: each element of a key once for each 256
// queries. Precision: everything in the accumulation type.
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/compress.inl.h"
#include "cpu/generic/inverse_index.inl.h"
#include "cpu/generic/rows.inl.h"
#include "cpu/generic/top_k.inl.h"
#include "cpu/topk_read.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kBlockBytes = 64 << 10;  // of rows that all panels go over while they lie in the L2 cache

template <class A>
constexpr A kCosineEps = A(1e-6);

// 1 / the guarded norm of a row.
template <class A, class T>
MK_INLINE A inverse_norm(const T* row, int64_t width) {
  using V = Vec<A>;
  V sum = V::zero();
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    const V x = load<V>(row + j, part);
    sum = fma(x, x, sum);
  });
  A norm[V::kLanes];
  sqrt(V::set1(reduce_add(sum) + kCosineEps<A>)).store(norm);
  return A(1) / norm[0];
}

// The query as scores take it: widened, for the cosine divided by its norm.
template <class A, class T>
void load_query(const TopkArgs& a, int64_t b, int64_t q, A* to, int64_t step) {
  const T* from = row_at<T>(a.query, b, 0, q);
  const A factor = a.similarity == TopkArgs::cosine ? inverse_norm<A>(from, a.width) : A(1);
  for (int64_t j = 0; j < a.width; j++) to[j * step] = A(to_float(from[j])) * factor;
}

// What a search keeps of its queries.
template <class A>
struct Candidates {
  Pair<A>* pairs;  // [query][capacity]
  int64_t* count;
  A* threshold;
  int64_t slots, capacity;

  MK_INLINE void offer_to(int64_t query, A score, int64_t index) const {
    offer<A>(pairs + query * capacity, count[query], threshold[query], slots, capacity, score, index);
  }
  // A score that equals what is reached may come from a lower row, and passes: the least normal number, or two units in
  // the last place, are left between.
  MK_INLINE void start(int64_t queries, const A* reached) const {
    constexpr A kLeast = sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022), kUnits = sizeof(A) == 4 ? A(0x1p-22) : A(0x1p-51);
    for (int64_t q = 0; q < queries; q++) {
      A bound;
      __atomic_load(reached + q, &bound, __ATOMIC_RELAXED);
      const A size = bound < A(0) ? -bound : bound;
      count[q] = 0, threshold[q] = bound < kInfinity<A> ? bound - (size * kUnits + kLeast) : -kInfinity<A>;
    }
  }
  // The best so far, 0 where there are fewer than k.
  void finish(int64_t queries, Pair<A>* found, A* reached) const {
    for (int64_t q = 0; q < queries; q++, found += slots) {
      Pair<A>* own = pairs + q * capacity;
      if (count[q] > slots) {
        select_best(own, count[q], slots);
        const A last = score_of<A>(own[slots - 1]);
        A known;
        __atomic_load(reached + q, &known, __ATOMIC_RELAXED);
        if (last > known) __atomic_store(reached + q, &last, __ATOMIC_RELAXED);
      }
      for (int64_t i = 0; i < slots; i++) found[i] = i < count[q] ? own[i] : Pair<A>(0);
    }
  }
};

template <class A>
MK_INLINE int64_t block_rows(const TopkArgs& a) {
  constexpr int64_t kRowsOfTile = tile_rows(2);
  const int64_t rows = kBlockBytes / (larger(a.width, 1) * int64_t(sizeof(A)));
  return larger(smaller(rows, 512) / kRowsOfTile, 1) * kRowsOfTile;
}

template <class A>
struct SearchScratch {
  Candidates<A> candidates;
  A *query, *rows, *norms, *scores, *lanes;  // lanes: 0, 1, 2 ...
  int32_t* index;
  int64_t used;

  SearchScratch(const TopkArgs& a, void* memory) {
    constexpr int64_t kColumns = 2 * kLanes<A>;
    const int64_t queries = smaller(kTopkQueries, a.queries), block = larger(block_rows<A>(a), kTile);
    Carver carver(memory);
    candidates.slots = a.slots, candidates.capacity = a.slots + larger(a.slots, 32);
    candidates.pairs = carver.take<Pair<A>>(queries * candidates.capacity);
    candidates.count = carver.take<int64_t>(queries);
    candidates.threshold = carver.take<A>(queries + kColumns);
    query = carver.take<A>((queries + kColumns) * a.width);
    rows = carver.take<A>(a.few ? 0 : block * a.width);
    norms = carver.take<A>(block);
    scores = carver.take<A>(larger(4 * kTile, tile_rows(2) * kColumns));
    lanes = carver.take<A>(kLanes<A>);
    index = carver.take<int32_t>(block);
    used = carver.used();
  }
};
template <class A>
int64_t topk_search_scratch(const TopkArgs& a) {
  return SearchScratch<A>(a, nullptr).used;
}

// The rows of a block that take part, as offsets from its first one.
MK_INLINE int64_t list_rows(const TopkArgs& a, int64_t b, int64_t first, int64_t rows, int32_t* index) {
  if (!a.mask) {
    for (int64_t i = 0; i < rows; i++) index[i] = int32_t(i);
    return rows;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < rows; i++) {
    index[count] = int32_t(i);
    count += a.mask[b * a.mask_b + first + i];
  }
  return count;
}

// Offers what passes of `count` scores of tile row `row`: lane l is query `query` + l.
template <class A, int N>
MK_INLINE void compare_queries(const SearchScratch<A>& w, A* scores, const A* factor, bool negative, int64_t query,
                               int64_t queries, int64_t row) {
  using V = Vec<A>;
  for (int n = 0; n < N; n++) {
    V v = V::load(scores + n * V::kLanes);
    if (factor) v = v * V::set1(*factor);
    if (negative) v = -v;
    const auto passed = !(v <= V::load(w.candidates.threshold + query + n * V::kLanes));
    if (!any(passed)) continue;
    A score[V::kLanes], lane[V::kLanes];
    compress(passed, V::load(w.lanes), lane);
    const int64_t count = compress(passed, v, score), first = query + n * V::kLanes;
    for (int64_t i = 0; i < count; i++)
      if (first + int64_t(lane[i]) < queries) w.candidates.offer_to(first + int64_t(lane[i]), score[i], row);
  }
}

// The panels of N vectors of queries against a block of rows.
template <class A, int N, class Term>
void search_block(const TopkArgs& a, const SearchScratch<A>& w, int64_t queries, const A* rows, int64_t stride,
                  int64_t count, int64_t first) {
  constexpr int64_t kColumns = N * kLanes<A>;
  const bool cosine = a.similarity == TopkArgs::cosine, negative = a.similarity == TopkArgs::l2;
  for (int64_t query = 0; query < queries; query += kColumns)
    for (int64_t begin = 0; begin < count; begin += tile_rows(N)) {
      const int64_t tile = smaller(tile_rows(N), count - begin);
      gemm_tile_for<A, N, false, Term>(tile)(a.width, rows + begin * stride, stride, w.query + query * a.width, nullptr,
                                             0, w.scores, kColumns);
      for (int64_t i = 0; i < tile; i++)
        compare_queries<A, N>(w, w.scores + i * kColumns, cosine ? w.norms + begin + i : nullptr, negative, query,
                              queries, first + w.index[begin + i]);
    }
}

template <class A, class T, int N>
void search_tiles(const TopkArgs& a, const SearchScratch<A>& w, int64_t b, int64_t begin, int64_t end, int64_t first,
                  int64_t last) {
  constexpr int64_t kColumns = N * kLanes<A>;
  const int64_t queries = end - begin, block = block_rows<A>(a);
  for (int64_t q = 0; q < (queries + kColumns - 1) / kColumns * kColumns; q++) {
    A* to = w.query + q / kColumns * kColumns * a.width + q % kColumns;
    if (q < queries)
      load_query<A, T>(a, b, begin + q, to, kColumns);
    else
      for (int64_t j = 0; j < a.width; j++) to[j * kColumns] = 0;
  }
  for (int64_t row = first; row < last; row += block) {
    const T* keys = row_at<T>(a.key, b, 0, row);
    const int64_t count = list_rows(a, b, row, smaller(block, last - row), w.index);
    const A* rows = w.rows;
    int64_t stride = a.width;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!a.mask) rows = keys, stride = a.key.row;
    }
    for (int64_t i = 0; rows == w.rows && i < count; i++)
      widen(keys + w.index[i] * a.key.row, a.width, w.rows + i * a.width);
    if (a.similarity == TopkArgs::cosine)
      for (int64_t i = 0; i < count; i++) w.norms[i] = inverse_norm<A>(rows + i * stride, a.width);
    if (a.similarity == TopkArgs::l2)
      search_block<A, N, Distances>(a, w, queries, rows, stride, count, row);
    else
      search_block<A, N, Products>(a, w, queries, rows, stride, count, row);
  }
}

// Scores of up to four queries for a tile of rows, at w.scores + kTile a query.
template <class A, class T>
MK_INLINE void score_few(const TopkArgs& a, const SearchScratch<A>& w, const Rows<T>& rows, int64_t query,
                         int64_t queries) {
  using V = Vec<A>;
  const A* from = w.query + query * a.width;
  if (a.similarity == TopkArgs::dot) return dot_rows<T, Dot::plain>(rows, queries, from, w.scores);
  if (a.similarity == TopkArgs::l2)
    dot_rows<T, Dot::distance>(rows, queries, from, w.scores);
  else
    dot_rows<T, Dot::squares>(rows, queries, from, w.scores, w.norms);
  for (int64_t i = 0; i < rows.count; i += V::kLanes) {
    V factor = V::set1(A(-1));
    if (a.similarity == TopkArgs::cosine) factor = V::set1(A(1)) / sqrt(V::load(w.norms + i) + V::set1(kCosineEps<A>));
    for (int64_t q = 0; q < queries; q++) (V::load(w.scores + q * kTile + i) * factor).store(w.scores + q * kTile + i);
  }
}

template <class A, class T>
void search_few(const TopkArgs& a, const SearchScratch<A>& w, int64_t b, int64_t begin, int64_t end, int64_t first,
                int64_t last) {
  using V = Vec<A>;
  const int64_t queries = end - begin;
  for (int64_t q = 0; q < queries; q++) load_query<A, T>(a, b, begin + q, w.query + q * a.width, 1);
  for (int64_t row = first; row < last; row += kTile) {
    const int64_t count = list_rows(a, b, row, smaller(kTile, last - row), w.index);
    const T* keys = row_at<T>(a.key, b, 0, row);
    const bool more = row + (kAhead + 1) * kTile <= last && count == kTile;
    for (int64_t query = 0; query < queries; query += 4) {
      const int64_t group = smaller(4, queries - query);
      const T* ahead = more && query == 0 ? keys + kAhead * kTile * a.key.row : nullptr;
      score_few<A, T>(a, w, {keys, a.key.row, w.index, count, a.width, ahead, true}, query, group);
      for (int64_t q = 0; q < group; q++) {
        const A *scores = w.scores + q * kTile, &threshold = w.candidates.threshold[query + q];
        for (int64_t i = 0; i < count; i += V::kLanes) {
          if (!any(!(V::load(scores + i) <= V::set1(threshold)))) continue;
          for (int64_t l = i; l < smaller(i + V::kLanes, count); l++)
            if (!(scores[l] <= threshold)) w.candidates.offer_to(query + q, scores[l], row + w.index[l]);
        }
      }
    }
  }
}

template <class A, class T>
void topk_search(const TopkArgs& a, int64_t b, int64_t begin, int64_t end, int64_t first, int64_t last, void* found,
                 void* scratch) {
  const SearchScratch<A> w(a, scratch);
  const int64_t queries = end - begin;
  A* reached = static_cast<A*>(a.reached) + b * a.queries + begin;
  w.candidates.start(queries, reached);
  for (int64_t l = 0; l < kLanes<A>; l++) w.lanes[l] = A(l);
  // Lanes without a query: no number passes.
  for (int64_t q = queries; q < queries + 2 * kLanes<A>; q++) w.candidates.threshold[q] = kInfinity<A>;
  if (a.few)
    search_few<A, T>(a, w, b, begin, end, first, last);
  else if (queries <= kLanes<A>)
    search_tiles<A, T, 1>(a, w, b, begin, end, first, last);
  else
    search_tiles<A, T, 2>(a, w, b, begin, end, first, last);
  w.candidates.finish(queries, static_cast<Pair<A>*>(found), reached);
}

// A row of the memory for every slot that has one, kTile slots at a time: body(rows, first slot).
template <class T, class Body>
MK_INLINE void for_chosen(const AttentionTensor& memory, int64_t b, const int32_t* index, int64_t count, int64_t width,
                          const Body& body) {
  for (int64_t i = 0; i < count; i += kTile)
    body(Rows<T>{row_at<T>(memory, b, 0, 0), memory.row, index + i, smaller(kTile, count - i), width}, i);
}

// Scores become weights, softmax(scale score).
template <class A>
void soften(A scale, int64_t count, A* scores) {
  using V = Vec<A>;
  A top = -kInfinity<A>;
  for (int64_t i = 0; i < count; i++) {
    scores[i] *= scale;
    if (scores[i] > top) top = scores[i];
  }
  A total = 0;
  for_each_vec<V>(
      count, [&](int64_t i, auto part) { store(exp(load<V>(scores + i, part) - V::set1(top)), scores + i, part); });
  for (int64_t i = 0; i < count; i++) total += scores[i];
  for (int64_t i = 0; i < count; i++) scores[i] /= total;
}

template <class A>
struct FinishScratch {
  Pair<A>* pairs;
  A *weights, *sums;
  int32_t* index;
  int64_t used;

  FinishScratch(const TopkArgs& a, int64_t parts, void* memory) {
    Carver carver(memory);
    pairs = carver.take<Pair<A>>(parts * a.slots);
    weights = carver.take<A>(a.slots);
    index = carver.take<int32_t>(a.slots);
    sums = carver.take<A>(a.value_width);
    used = carver.used();
  }
};
template <class A>
int64_t topk_finish_scratch(const TopkArgs& a, int64_t parts) {
  return FinishScratch<A>(a, parts, nullptr).used;
}

template <class A, class T>
void topk_finish(const TopkArgs& a, int64_t b, int64_t q, const void* found, int64_t parts, int64_t step,
                 void* scratch) {
  using V = Vec<A>;
  const FinishScratch<A> w(a, parts, scratch);
  const int64_t at = b * a.queries + q;
  int64_t count = 0;
  for (int64_t part = 0; part < parts; part++)
    for (int64_t i = 0; i < a.slots; i++) {
      const Pair<A> pair = static_cast<const Pair<A>*>(found)[part * step + i];
      w.pairs[count] = pair;
      count += pair != 0;
    }
  if (count > a.slots) select_best(w.pairs, count, a.slots);
  count = smaller(count, a.slots);
  sort_best(w.pairs, count);
  for (int64_t i = 0; i < count; i++) {
    w.weights[i] = score_of<A>(w.pairs[i]);
    w.index[i] = int32_t(index_of<A>(w.pairs[i]));
    const T* row = row_at<T>(a.value, b, 0, w.index[i]);
    for (int64_t j = 0; j < a.value_width; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j);
  }
  soften(A(a.scale), count, w.weights);
  T* weights = static_cast<T*>(a.weights) + at * a.slots;
  int64_t* chosen = a.chosen + at * a.slots;
  for (int64_t i = 0; i < a.slots; i++) {
    weights[i] = convert<T>::from(i < count ? w.weights[i] : A(0));
    chosen[i] = i < count ? w.index[i] : -1;
  }
  for_each_vec<V>(a.value_width, [&](int64_t j, auto part) { store(V::zero(), w.sums + j, part); });
  int64_t heavy = 0;  // what a row of weight 0 holds reaches nothing
  for (int64_t i = 0; i < count; i++) {
    w.weights[heavy] = w.weights[i], w.index[heavy] = w.index[i];
    heavy += w.weights[i] != A(0);
  }
  for_chosen<T>(a.value, b, w.index, heavy, a.value_width,
                [&](const Rows<T>& rows, int64_t i) { add_rows(rows, 1, w.weights + i, w.sums); });
  T* read = static_cast<T*>(a.read) + at * a.value_width;
  for_each_vec<V>(a.value_width, [&](int64_t j, auto part) { store(load<V>(w.sums + j, part), read + j, part); });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL

#include "cpu/generic/topk_read_backward.inl.h"
