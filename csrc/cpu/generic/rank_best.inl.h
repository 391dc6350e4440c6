// The k best of a few hundred scores, sorted, without a branch on a score: of the maxima of 2 k or more groups a
// bisection finds about the k-th, which bounds the k-th best from below so well that little more than k are left, and
// those are ranked by counting, against each in turn, how many are better. Ties go to the lowest identifier. What does
// not fit (NaN, very many equal scores, many slots) goes through sortable pairs (top_k.inl.h), with the same result.
#pragma once
#include "cpu/generic/attention_block.inl.h"
#include "cpu/generic/compress.inl.h"
#include "cpu/generic/top_k.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kMostRanked = 64;  // slots; more are cheaper to sort

// Identifiers are whole numbers that A holds exactly.
template <class A>
struct RankBest {
  A *scores, *ids, *kept_scores, *kept_ids, *ranks;  // room for two more vectors
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
  // are. -inf is none. `ascending`: the identifiers come so.
  int64_t find(int64_t count, int64_t k, A* score, A* id, bool ascending) const {
    if (k > kMostRanked || count < k) return sorted(count, k, score, id);
    fill(scores, count);
    A low, high;
    if (!bounds(count, k, low, high)) return sorted(count, k, score, id);
    int64_t left = keep(scores, ids, count, low);
    const int64_t wanted = k + 2 * kMore;
    if (left > wanted) {
      for (int round = 0; round < 12; round++) {
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
      if (left > room(k)) return sorted(count, k, score, id);
    }
    rank(left);
    const A *from = kept_scores, *from_ids = kept_ids, *places = ranks;
    for (int64_t i = 0; i < left; i++) {  // also those past the k-th: a branch would cost more
      const int64_t place = int64_t(places[i]);
      score[place] = from[i], id[place] = from_ids[i];
    }
    if (!ascending) order_equal(left, score, id);
    return k;
  }

 private:
  using V = Vec<A>;

  static MK_INLINE void fill(A* from, int64_t count) {
    V::set1(-kInfinity<A>).store(from + count);
    V::set1(-kInfinity<A>).store(from + count + V::kLanes);
  }

  MK_INLINE bool bounds(int64_t count, int64_t k, A& low, A& high) const {
    switch ((k + V::kLanes - 1) / V::kLanes) {
      case 1:
        return bounds_of<2>(count, k, low, high);
      case 2:
        return bounds_of<4>(count, k, low, high);
      default:
        return bounds_of<2 * kMostRanked / V::kLanes>(count, k, low, high);
    }
  }

  // At least k scores are >= low, none is > high; false where something is no number or fewer than k are finite. N
  // vectors of groups.
  template <int N>
  bool bounds_of(int64_t count, int64_t k, A& low, A& high) const {
    const V none = V::set1(-kInfinity<A>), all = V::set1(kInfinity<A>);
    V group[N], sum[N];
    for (int g = 0; g < N; g++) group[g] = none, sum[g] = V::zero();
    int64_t i = 0;
    for (; i + (N - 1) * V::kLanes < count; i += N * V::kLanes)
      for (int g = 0; g < N; g++) {
        const V v = V::load(scores + i + g * V::kLanes);
        group[g] = max(group[g], v), sum[g] = sum[g] + v;
      }
    for (int g = 0; i < count; i += V::kLanes, g++) {
      const V v = V::load(scores + i);
      group[g] = max(group[g], v), sum[g] = sum[g] + v;
    }
    V least = all, most = group[0], total = sum[0];
    for (int g = 0; g < N; g++) least = min(least, select(group[g] > none, group[g], all)), most = max(most, group[g]);
    for (int g = 1; g < N; g++) total = total + sum[g];
    low = -reduce_max(-least), high = reduce_max(most);
    const A numbers = reduce_add(total);  // -inf beyond the end; NaN from a NaN or from -inf and +inf
    if (numbers != numbers || !(low < kInfinity<A> && high < kInfinity<A>)) return false;
    if (above<N>(group, low) < k) {  // too few groups have one: the least of all that are there
      V every = all;
      for_each_vec<V>(count,
                      [&](int64_t j, auto part) { every = in_part(min(every, V::load(scores + j)), every, part); });
      low = -reduce_max(-every);
      return low > -kInfinity<A>;
    }
    A end = high;
    for (int round = 0; round < 6; round++) {  // no branch: half of the time it would be the other one
      const A middle = low + (end - low) * A(0.5);
      const bool enough = above<N>(group, middle) >= k;
      low = enough ? middle : low, end = enough ? end : middle;
    }
    return true;
  }

  template <int N>
  static MK_INLINE int64_t above(const V* group, A bound) {
    int64_t found = 0;
    for (int g = 0; g < N; g++) found += lanes_in(group[g] >= V::set1(bound));
    return found;
  }

  MK_INLINE int64_t keep(const A* from, const A* from_ids, int64_t count, A low) const {
    A *to = kept_scores, *to_ids = kept_ids;          // a member would be read again after each store
    for (int64_t i = 0; i < count; i += V::kLanes) {  // beyond the end: -inf
      const V v = V::load(from + i), id = V::load(from_ids + i);
      const auto mask = v >= V::set1(low);
      const int64_t left = compress(mask, v, to);
      compress(mask, id, to_ids);
      to += left, to_ids += left;
    }
    fill(to, 0);
    return to - kept_scores;
  }

  static MK_INLINE int64_t at_least(const A* from, int64_t count, A bound) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += V::kLanes) found += lanes_in(V::load(from + i) >= V::set1(bound));
    return found;
  }

  // Ranks of N vectors of what is left, from `first` on. The counts of one vector wait for each other.
  template <int N>
  MK_INLINE void rank_some(int64_t first, int64_t count) const {
    const V one = V::set1(A(1));
    const A* all = kept_scores;
    V own[N], better[N];
    for (int n = 0; n < N; n++) own[n] = V::load(all + first + n * V::kLanes), better[n] = V::zero();
    for (int64_t j = 0; j < first; j++) {
      const V other = V::set1(all[j]);
      for (int n = 0; n < N; n++) better[n] = add_in(other >= own[n], better[n], one);
    }
#pragma GCC unroll 4
    for (int m = 0; m < N; m++) {
      const int64_t begin = first + m * V::kLanes;
      for (int64_t j = begin; j < smaller(begin + V::kLanes, count); j++) {
        const V other = V::set1(all[j]);
        const auto before = V::first_lanes(j - begin + 1);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const auto over = n < m ? other > own[n] : other >= own[n];
          better[n] = add_in(n == m ? (other > own[n]) | (over & !before) : over, better[n], one);
        }
      }
    }
    for (int64_t j = first + N * V::kLanes; j < count; j++) {
      const V other = V::set1(all[j]);
      for (int n = 0; n < N; n++) better[n] = add_in(other > own[n], better[n], one);
    }
    for (int n = 0; n < N; n++) better[n].store(ranks + first + n * V::kLanes);
  }

  // ranks[i] = how many are larger than i, or equal and before it.
  void rank(int64_t count) const {
    int64_t i = 0;
    for (; i + 3 * V::kLanes < count; i += 4 * V::kLanes) rank_some<4>(i, count);
    if (i + 2 * V::kLanes < count) return rank_some<3>(i, count);
    if (i < count) rank_some<2>(i, count);
  }

  // Equal scores come by identifiers: mostly they do.
  static void order_equal(int64_t count, A* score, A* id) {
    bool ordered = true;
    for (int64_t i = 1; i < count; i += V::kLanes) {  // past the end: whatever is there
      const auto falls = V::load(id + i - 1) > V::load(id + i);
      ordered = ordered && !any((V::load(score + i - 1) == V::load(score + i)) & falls);
    }
    for (int64_t i = 1; i < count && !ordered; i++)
      for (int64_t j = i; j > 0 && score[j - 1] == score[j] && id[j - 1] > id[j]; j--) exchange(id[j - 1], id[j]);
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
