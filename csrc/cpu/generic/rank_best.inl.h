// The k best of a few hundred scores, sorted, without a branch on a score: the least of k or more group maxima bounds
// the k-th best from below, bisection raises the bound until little more than k are left, and those are ranked by
// counting, against each in turn, how many are better. Ties go to the lowest identifier. What does not fit (NaN, very
// many equal scores, many slots) goes through sortable pairs (top_k.inl.h), with the same result.
#pragma once
#include "cpu/generic/attention_block.inl.h"
#include "cpu/generic/top_k.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

#if !MK_HAVE_COMPRESS
// The lanes of the mask go to `to`, whole vectors of which may be written; returns how many there are.
template <class T>
MK_INLINE int64_t compress(typename Vec<T>::Mask mask, Vec<T> v, T* to) {
  T lanes[Vec<T>::kLanes], kept[Vec<T>::kLanes];
  v.store(lanes);
  select(mask, Vec<T>::set1(T(1)), Vec<T>::zero()).store(kept);
  int64_t count = 0;
  for (int64_t l = 0; l < Vec<T>::kLanes; l++) {
    to[count] = lanes[l];
    count += kept[l] != T(0);
  }
  return count;
}
#endif

constexpr int64_t kMostRanked = 64;  // slots; more are cheaper to sort

// Identifiers are whole numbers that A holds exactly.
template <class A>
struct RankBest {
  A *scores, *ids, *kept_scores, *kept_ids, *ranks;  // whole vectors and one more
  Pair<A>* pairs;

  static constexpr int64_t kMore = Vec<A>::kLanes;

  MK_INLINE RankBest(Carver& carver, int64_t count)
      : scores(carver.take<A>(count + 2 * kMore)),
        ids(carver.take<A>(count + 2 * kMore)),
        kept_scores(carver.take<A>(count + 2 * kMore)),
        kept_ids(carver.take<A>(count + 2 * kMore)),
        ranks(carver.take<A>(count + 2 * kMore)),
        pairs(carver.take<Pair<A>>(count)) {}

  // Elements of `score` and `id` of find: more than k may be written.
  static MK_INLINE int64_t room(int64_t k) { return k > kMostRanked ? k : 4 * (k + kMore); }

  // Of scores and ids [0, count), both written beyond their end: the k best to `score` and `id`; returns how many there
  // are. -inf is none.
  int64_t find(int64_t count, int64_t k, A* score, A* id) const {
    if (k > kMostRanked || count < k) return sorted(count, k, score, id);
    fill(scores, count);
    A low, high;
    if (!bounds(count, k, low, high)) return sorted(count, k, score, id);
    int64_t left = keep(scores, ids, count, low);
    const int64_t wanted = k + kMore;
    for (int round = 0; round < 12 && left > wanted; round++) {
      const A middle = low + (high - low) * A(0.5);
      if (!(low < middle && middle < high)) break;
      const int64_t above = at_least(kept_scores, left, middle);
      if (above < k) {
        high = middle;
      } else {
        low = middle;
        if (above <= wanted) break;
      }
    }
    left = keep(kept_scores, kept_ids, left, low);
    if (left > 4 * wanted) return sorted(count, k, score, id);
    rank(left);
    for (int64_t i = 0; i < left; i++) {  // also those past the k-th: a branch would cost more
      const int64_t place = int64_t(ranks[i]);
      score[place] = kept_scores[i], id[place] = kept_ids[i];
    }
    return k;
  }

 private:
  using V = Vec<A>;

  static MK_INLINE void fill(A* from, int64_t count) {
    V::set1(-kInfinity<A>).store(from + count);
    V::set1(-kInfinity<A>).store(from + count + V::kLanes);
  }

  // At least k scores are >= low, none is > high; false where something is no number or fewer than k are finite.
  MK_INLINE bool bounds(int64_t count, int64_t k, A& low, A& high) const {
    V group[kMostRanked / V::kLanes];
    const int64_t groups = (k + V::kLanes - 1) / V::kLanes;
    for (int64_t g = 0; g < groups; g++) group[g] = V::set1(-kInfinity<A>);
    V odd = V::zero();
    for (int64_t i = 0, g = 0; i < count; i += V::kLanes, g = g + 1 < groups ? g + 1 : 0) {
      const V v = V::load(scores + i);
      odd = select(v == v, odd, V::set1(A(1)));
      group[g] = max(group[g], v);
    }
    V least = group[0], most = group[0];
    for (int64_t g = 1; g < groups; g++) least = min(least, group[g]), most = max(most, group[g]);
    low = -reduce_max(-least), high = reduce_max(most);
    if (low == -kInfinity<A>) {  // too few for every group to have one: the least of all that are there
      V all = V::set1(kInfinity<A>);
      for_each_vec<V>(count, [&](int64_t i, auto part) { all = in_part(min(all, V::load(scores + i)), all, part); });
      low = -reduce_max(-all);
    }
    return reduce_max(odd) == A(0) && low > -kInfinity<A> && high < kInfinity<A>;
  }

  MK_INLINE int64_t keep(const A* from, const A* from_ids, int64_t count, A low) const {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i += V::kLanes) {  // beyond the end: -inf
      const V v = V::load(from + i);
      const auto mask = v >= V::set1(low);
      compress(mask, V::load(from_ids + i), kept_ids + left);
      left += compress(mask, v, kept_scores + left);
    }
    fill(kept_scores, left);
    return left;
  }

  MK_INLINE int64_t at_least(const A* from, int64_t count, A bound) const {
    V above = V::zero();
    for (int64_t i = 0; i < count; i += V::kLanes)
      above = above + select(V::load(from + i) >= V::set1(bound), V::set1(A(1)), V::zero());
    return int64_t(reduce_add(above));
  }

  // ranks[i] = how many are better than i. Where the ranks do not add up, some scores are equal: once more with ids.
  void rank(int64_t count) const {
    V total = V::zero();
    for (int64_t i = 0; i < count; i += 2 * V::kLanes) {  // two vectors: the sums of one wait for each other
      const V low = V::load(kept_scores + i), high = V::load(kept_scores + i + V::kLanes), one = V::set1(A(1));
      V better_low = V::zero(), better_high = V::zero();
      for (int64_t j = 0; j < count; j++) {
        const V other = V::set1(kept_scores[j]);
        better_low = select(other > low, better_low + one, better_low);
        better_high = select(other > high, better_high + one, better_high);
      }
      better_low.store(ranks + i), better_high.store(ranks + i + V::kLanes);
      total = total + select(V::first_lanes(smaller(count - i, V::kLanes)), better_low, V::zero());
      total =
          total + select(V::first_lanes(larger(0, smaller(count - i - V::kLanes, V::kLanes))), better_high, V::zero());
    }
    if (int64_t(reduce_add(total)) != count * (count - 1) / 2) rank_with_ties(count);
  }

  void rank_with_ties(int64_t count) const {
    const V one = V::set1(A(1));
    for (int64_t i = 0; i < count; i += V::kLanes) {
      const V v = V::load(kept_scores + i), id = V::load(kept_ids + i);
      V better = V::zero();
      for (int64_t j = 0; j < count; j++) {
        const V other = V::set1(kept_scores[j]);
        better = better + select((other > v) | ((other == v) & (V::set1(kept_ids[j]) < id)), one, V::zero());
      }
      better.store(ranks + i);
    }
  }

  int64_t sorted(int64_t count, int64_t k, A* score, A* id) const {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++)
      if (!(scores[i] <= -kInfinity<A>)) pairs[n++] = pair_of(scores[i], int64_t(ids[i]));
    if (n > k) select_best(pairs, n, k);
    n = smaller(n, k);
    sort_best(pairs, n);
    for (int64_t i = 0; i < n; i++) score[i] = score_of<A>(pairs[i]), id[i] = A(index_of<A>(pairs[i]));
    return n;
  }
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
