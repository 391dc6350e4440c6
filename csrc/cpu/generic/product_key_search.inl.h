// product_key_search: scores of both halves, the k best subkeys of each, the k best of their sums.
//
// A task owns kProductKeyQueries queries of a head. Its scores [half][query][S] stay in the L2 cache: register tiles of
// queries x packed panels of subkeys, then rank_best per query and half. With both halves sorted, the pair (a, b),
// counted from 1, has a b - 1 others that are at least as good, so that only pairs with a b <= k compete: k (1 + ln k)
// instead of k^2; where another rounds to the k-th score, those of this score are chosen anew (settle_ties). Bytes: the
// subkeys of a head once a task, from the cache. Precision: everything in the accumulation type A. Identifiers of pairs
// are whole numbers in A: S up to 4096 in float; beyond, and for NaN, sorted as integers.
//
// Backward: dquery sums the chosen subkeys, a subkey sums the queries that chose it (inverse_index.inl.h).
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/inverse_index.inl.h"
#include "cpu/generic/rank_best.inl.h"
#include "cpu/generic/rows.inl.h"
#include "cpu/product_key_search.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
constexpr int64_t kColumns = 2 * kLanes<A>;

MK_INLINE int64_t panels_of(int64_t count, int64_t columns) { return (count + columns - 1) / columns; }

template <class A>
int64_t product_key_packed_bytes(const ProductKeyArgs& a) {
  return panels_of(a.count, kColumns<A>) * kColumns<A> * a.width * int64_t(sizeof(A));
}

// Panels of one half of a head: [panel][D][columns], zero past the last subkey.
template <class A, class T>
void product_key_pack(const ProductKeyArgs& a, int64_t half) {
  const int64_t panels = panels_of(a.count, kColumns<A>);
  A* to = static_cast<A*>(a.packed) + half * panels * kColumns<A> * a.width;
  for (int64_t s = 0; s < panels * kColumns<A>; s++) {
    A* column = to + s / kColumns<A> * kColumns<A> * a.width + s % kColumns<A>;
    const T* row = row_at<T>(a.subkeys, half / 2, half % 2, s);
    for (int64_t j = 0; j < a.width; j++) column[j * kColumns<A>] = s < a.count ? A(to_float(row[j])) : A(0);
  }
}

MK_INLINE int64_t staircase(int64_t k, int64_t count) {
  int64_t pairs = 0;
  for (int64_t i = 1; i <= smaller(k, count); i++) pairs += smaller(k / i, count);
  return pairs;
}

template <class A>
struct ProductKeyScratch {
  A *query, *scores;
  A* best[2][2];         // of each half: scores, identifiers
  A* edges;              // what row i of the pairs leaves out is no better
  int32_t* others;       // of row i of the pairs: how many compete
  int64_t packed, step;  // of all panels of a half; of the scores of one query, with the room that RankBest wants
  RankBest<A> halves, pairs;
  int64_t used;

  ProductKeyScratch(const ProductKeyArgs& a, Carver carver)
      : query(carver.take<A>(kProductKeyQueries * a.width)),
        scores(carver.take<A>(2 * kProductKeyQueries * (panels_of(a.count, kColumns<A>) + 1) * kColumns<A>)),
        packed(panels_of(a.count, kColumns<A>) * kColumns<A>),
        step(packed + kColumns<A>),
        halves(carver, a.count),
        pairs(carver, larger(staircase(a.slots, a.count), a.slots)) {
    for (auto& half : best)
      for (A*& x : half) x = carver.take<A>(RankBest<A>::room(a.slots) + kLanes<A>);
    edges = carver.take<A>(a.slots + 1 + kLanes<A>), others = carver.take<int32_t>(a.slots);
    used = carver.used();
  }
};
template <class A>
int64_t product_key_scratch(const ProductKeyArgs& a) {
  return ProductKeyScratch<A>(a, Carver(nullptr)).used;
}

// scores[query][S] of one half.
template <class A, class T>
void score_half(const ProductKeyArgs& a, const ProductKeyScratch<A>& w, int64_t h, int64_t p, int64_t begin,
                int64_t queries, A* scores) {
  const T* from = row_at<T>(a.query, begin, h, p);
  // Copied in any type: queries often lie a power of two apart, where more than a few share their lines of the L1
  // cache.
  for (int64_t q = 0; q < queries; q++) widen(from + q * a.query.b, a.width, w.query + q * a.width);
  const A* packed = static_cast<const A*>(a.packed) + (h * 2 + p) * w.packed * a.width;
  for (int64_t column = 0; column < w.packed; column += kColumns<A>)
    for (int64_t q = 0; q < queries; q += tile_rows(2))
      gemm_tile_for<A, 2, false>(smaller(tile_rows(2), queries - q))(a.width, w.query + q * a.width, a.width,
                                                                     packed + column * a.width, nullptr, 0,
                                                                     scores + q * w.step + column, w.step);
}

template <class A>
MK_INLINE bool same(A x, A y) {
  return x == y || (x != x && y != y);
}

// Unequal sums that round to the k-th score: the lowest of all S^2 keys that have it take the places from its first on.
// Rows of keys whose best is over or at the score have one over it, k at most in all, or give one of the wanted.
template <class A>
__attribute__((noinline)) void settle_ties(const ProductKeyArgs& a, const A* one, const A* other, A best_other,
                                           const A* scores, int64_t* chosen) {
  using V = Vec<A>;
  const A last = scores[a.slots - 1];
  int64_t place = a.slots - 1;
  while (place > 0 && same(scores[place - 1], last)) place--;
  for (int64_t i = 0; i < a.count; i++) {
    const A row = one[i], most = row + best_other;
    if (row <= -kInfinity<A> || !(most >= last || most != most)) continue;
    for (int64_t j = 0; j < a.count; j += V::kLanes) {
      const V sums = V::set1(row) + V::load(other + j);
      if (last == last && !any(sums == V::set1(last))) continue;
      for (int64_t l = j; l < smaller(j + V::kLanes, a.count); l++) {
        if (other[l] <= -kInfinity<A> || !same(row + other[l], last)) continue;
        chosen[place++] = i * a.count + l;
        if (place == a.slots) return;
      }
    }
  }
}

// Whether one of them is `wanted`, or that is NaN; read as whole vectors.
template <class A>
MK_INLINE bool any_equal(const A* from, int64_t count, A wanted) {
  using V = Vec<A>;
  bool found = wanted != wanted;
  for (int64_t i = 0; i < count; i += V::kLanes) found |= any(V::load(from + i) == V::set1(wanted));
  return found;
}

// The outputs of query q of the task from the best of both halves.
template <class A, class T>
void best_pairs(const ProductKeyArgs& a, const ProductKeyScratch<A>& w, int64_t q, const int64_t* count, int64_t at) {
  using V = Vec<A>;
  int64_t pairs = 0;
  const A best_other = w.best[1][0][0];
  const bool exact = double(a.count) * double(a.count) <= (sizeof(A) == 4 ? 0x1p24 : 0x1p53);
  for (int64_t i = 0; i < count[0]; i++) {
    const int64_t others = smaller(w.others[i], count[1]);
    const V score = V::set1(w.best[0][0][i]), id = V::set1(exact ? w.best[0][1][i] * A(a.count) : A(i * a.slots));
    for (int64_t j = 0; j < others; j += V::kLanes) {
      (score + V::load(w.best[1][0] + j)).store(w.pairs.scores + pairs + j);
      if (exact) (id + V::load(w.best[1][1] + j)).store(w.pairs.ids + pairs + j);
    }
    pairs += others;
    // The best sum that does not compete, or at least as much: past the k best of a half are no better than the last.
    w.edges[i] = w.best[0][0][i] + w.best[1][0][smaller(others, a.slots - 1)];
  }
  w.edges[count[0]] = (count[0] ? w.best[0][0][count[0] - 1] : A(0)) + best_other;
  V::set1(-kInfinity<A>).store(w.edges + count[0] + 1);
  int64_t* chosen = a.chosen + at * a.slots;
  T* scores = static_cast<T*>(a.scores) + at * a.slots;
  int64_t found;
  if (exact) {
    found = w.pairs.find(pairs, a.slots, w.best[0][0], w.best[0][1], false);
    for (int64_t i = 0; i < found; i++) chosen[i] = int64_t(w.best[0][1][i]);
  } else {
    found = 0;
    for (int64_t i = 0, n = 0; i < count[0]; i++)
      for (int64_t j = 0; j < smaller(a.slots / (i + 1), count[1]); j++, n++) {
        const int64_t index = int64_t(w.best[0][1][i]) * a.count + int64_t(w.best[1][1][j]);
        if (!(w.pairs.scores[n] <= -kInfinity<A>)) w.pairs.pairs[found++] = pair_of(w.pairs.scores[n], index);
      }
    if (found > a.slots) select_best(w.pairs.pairs, found, a.slots);
    found = smaller(found, a.slots);
    sort_best(w.pairs.pairs, found);
    for (int64_t i = 0; i < found; i++)
      w.best[0][0][i] = score_of<A>(w.pairs.pairs[i]), chosen[i] = index_of<A>(w.pairs.pairs[i]);
  }
  for (int64_t i = found; i < a.slots; i++) w.best[0][0][i] = -kInfinity<A>, chosen[i] = -1;
  if (found == a.slots && any_equal(w.edges, count[0] + 1, w.best[0][0][a.slots - 1]))
    settle_ties(a, w.scores + q * w.step, w.scores + (kProductKeyQueries + q) * w.step, best_other, w.best[0][0],
                chosen);
  for_each_vec<V>(a.slots, [&](int64_t i, auto part) { store(load<V>(w.best[0][0] + i, part), scores + i, part); });
}

template <class A, class T>
void product_key_forward(const ProductKeyArgs& a, int64_t h, int64_t begin, int64_t end, void* scratch) {
  const ProductKeyScratch<A> w(a, Carver(scratch));
  const int64_t queries = end - begin;
  for (int64_t p = 0; p < 2; p++)
    score_half<A, T>(a, w, h, p, begin, queries, w.scores + p * kProductKeyQueries * w.step);
  RankBest<A> halves = w.halves;
  for (int64_t i = 0; i < a.count; i++) halves.ids[i] = A(i);
  for (int64_t i = 0; i < a.slots; i++) w.others[i] = int32_t(a.slots / (i + 1));
  for (int64_t q = 0; q < queries; q++) {
    int64_t count[2];
    for (int64_t p = 0; p < 2; p++) {
      halves.scores = w.scores + (p * kProductKeyQueries + q) * w.step;
      count[p] = halves.find(a.count, a.slots, w.best[p][0], w.best[p][1], true);
    }
    best_pairs<A, T>(a, w, q, count, (begin + q) * a.heads + h);
  }
}

// The distinct ones of `count` parts, of which many are the same, and their gradients: rows and sums, zero before;
// returns how many. `place` of a subkey is where it stands in the list, after `base`; what is below is of another list.
template <class A>
int64_t distinct_parts(const int32_t* parts, const A* given, int64_t count, int32_t base, int32_t* place, int32_t* row,
                       A* sums) {
  int32_t end = base;
  for (int64_t i = 0; i < count; i++) {
    const int32_t seen = place[parts[i]];  // no branch: every other one is new
    const int32_t at = seen < base ? end : seen;
    place[parts[i]] = at, row[at - base] = parts[i], sums[at - base] += given[i];
    end += seen < base;
  }
  return end - base;
}

template <class A>
int64_t product_key_gradient_scratch(const ProductKeyArgs& a) {
  Carver carver(nullptr);
  carver.take<A>(a.width), carver.take<int32_t>(2 * a.count);
  carver.take<int32_t>(2 * a.slots), carver.take<A>(a.slots);
  return carver.used();
}

// Queries [begin, end) of head h.
template <class A, class T>
void product_key_gradient(const ProductKeyArgs& a, int64_t h, int64_t begin, int64_t end, void* scratch) {
  using V = Vec<A>;
  Carver carver(scratch);
  A* sums = carver.take<A>(a.width);
  int32_t *place = carver.take<int32_t>(2 * a.count), *parts = carver.take<int32_t>(2 * a.slots);
  A* given = carver.take<A>(a.slots);
  const int64_t subkeys = a.count, slots = a.slots;
  for (int64_t s = 0; s < 2 * subkeys; s++) place[s] = -1;
  const uint64_t reciprocal = ~uint64_t(0) / uint64_t(larger(subkeys, 1)) + 1;  // exact for 32 bits; of 1: 0
  for (int64_t b = begin; b < end; b++) {
    const int64_t* index = row_at<int64_t>(a.index, b, h, 0);
    const T* dscores = row_at<T>(a.dscores, b, h, 0);
    int64_t count = 0;
    for (int64_t i = 0; i < slots && a.dscores.data; i++) {
      const A d = A(to_float(dscores[i]));
      if (index[i] < 0 || d == A(0)) continue;
      const int64_t one = int64_t((unsigned __int128)uint64_t(index[i]) * reciprocal >> 64);
      parts[count] = int32_t(one), parts[slots + count] = int32_t(index[i] - one * subkeys), given[count++] = d;
    }
    for (int64_t p = 0; p < 2; p++) {
      const int64_t list = (h * 2 + p) * a.batch + b;
      int32_t* row = a.parts + list * slots;
      A* gradient = static_cast<A*>(a.given) + list * slots;
      for (int64_t i = 0; i < count; i++) gradient[i] = A(0);
      const int64_t distinct = distinct_parts(parts + p * slots, given, count, int32_t((b - begin) * slots),
                                              place + p * subkeys, row, gradient);
      a.distinct[list] = int32_t(distinct);
      if (!a.dquery) continue;
      for_each_vec<V>(a.width, [&](int64_t j, auto part) { store(V::zero(), sums + j, part); });
      for (int64_t i = 0; i < distinct; i += kTile)
        add_rows(Rows<T>{row_at<T>(a.subkeys, h, p, 0), a.subkeys.row, row + i, smaller(kTile, distinct - i), a.width},
                 1, gradient + i, sums);
      T* dquery = static_cast<T*>(a.dquery) + ((b * a.heads + h) * 2 + p) * a.width;
      for_each_vec<V>(a.width, [&](int64_t j, auto part) { store(load<V>(sums + j, part), dquery + j, part); });
    }
  }
}

// The parts of all queries of one half: [B][k], of each query the first `distinct`.
template <class A>
struct PartLists {
  const int32_t *parts, *distinct;
  const A* given;
  int64_t batch, slots;
};

// As invert() of inverse_index.inl.h, of lists.
template <class A>
void invert_lists(const PartLists<A>& lists, int64_t first, int64_t last, int64_t* start, Given<A, 1>* given) {
  const uint32_t begin = uint32_t(first), rows = uint32_t(last - first);
  const auto each = [&](const auto& body) {
    for (int64_t b = 0, at = 0; b < lists.batch; b++, at += lists.slots)
      for (int64_t i = at; i < at + lists.distinct[b]; i++) {
        const uint32_t row = uint32_t(lists.parts[i]) - begin;
        if (row < rows) body(row, b, lists.given[i]);
      }
  };
  for (uint32_t i = 0; i <= rows; i++) start[i] = 0;
  each([&](uint32_t row, int64_t, A) { start[row + 1]++; });
  for (uint32_t i = 1; i <= rows; i++) start[i] += start[i - 1];
  each([&](uint32_t row, int64_t b, A d) { given[start[row]++] = {0, int32_t(b), {d}}; });
}

template <class A>
int64_t product_key_subkeys_scratch(const ProductKeyArgs& a, int64_t rows) {
  Carver carver(nullptr);
  carver.take<int64_t>(rows + 1);
  carver.take<Given<A, 1>>(a.batch * a.slots);
  return carver.used();
}

// Gradients of subkeys [first, last) of one half of a head.
template <class A, class T>
void product_key_subkeys(const ProductKeyArgs& a, int64_t half, int64_t first, int64_t last, void* scratch) {
  Carver carver(scratch);
  int64_t* start = carver.take<int64_t>(last - first + 1);
  auto* given = carver.take<Given<A, 1>>(a.batch * a.slots);
  const int64_t from = half * a.batch;
  invert_lists<A>(
      {a.parts + from * a.slots, a.distinct + from, static_cast<const A*>(a.given) + from * a.slots, a.batch, a.slots},
      first, last, start, given);
  const AttentionTensor queries{row_at<T>(a.query, 0, half / 2, half % 2), 0, 0, a.query.b};
  T* to = static_cast<T*>(a.dsubkeys) + (half * a.count + first) * a.width;
  for (int64_t row = 0, begin = 0; row < last - first; begin = start[row++], to += a.width)
    write_memory_row<A, T, 0>(queries, 0, given + begin, start[row] - begin, a.width, A(1), to);
}

}  // namespace

#define MK_PRODUCT_KEY_SIZES(function) \
  { function<double>, function<float>, function<float>, function<float> }
#define MK_PRODUCT_KEY_TYPES(function) \
  { function<double, double>, function<float, float>, function<float, bfloat16>, function<float, float16> }
const ProductKeyKernels product_key_search = {
    MK_PRODUCT_KEY_SIZES(product_key_packed_bytes),     MK_PRODUCT_KEY_TYPES(product_key_pack),
    MK_PRODUCT_KEY_SIZES(product_key_scratch),          MK_PRODUCT_KEY_TYPES(product_key_forward),
    MK_PRODUCT_KEY_SIZES(product_key_gradient_scratch), MK_PRODUCT_KEY_TYPES(product_key_gradient),
    MK_PRODUCT_KEY_SIZES(product_key_subkeys_scratch),  MK_PRODUCT_KEY_TYPES(product_key_subkeys)};

}  // namespace mk::cpu::MK_LEVEL
