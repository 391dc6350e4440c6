// Choosing the k best of (score, index): a total order in which a larger score comes first, a NaN before all numbers
// and, of equal scores, the lower index. A pair is one unsigned number, so that comparing is one instruction, moving is
// one store, and a choice has one result whatever the order it is made in. No pair is 0.
#pragma once
#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// An order-preserving map of float and double to unsigned numbers; -0 counts as +0.
template <class A>
struct Ordered;
template <>
struct Ordered<float> {
  using Bits = uint32_t;
  using Pair = uint64_t;
  static constexpr Bits kSign = 0x80000000u, kNaN = 0x7fc00000u;
};
template <>
struct Ordered<double> {
  using Bits = uint64_t;
  __extension__ using Pair = unsigned __int128;
  static constexpr Bits kSign = 0x8000000000000000u, kNaN = 0x7ff8000000000000u;
};
template <class A>
using Pair = typename Ordered<A>::Pair;

template <class A>
MK_INLINE Pair<A> pair_of(A score, int64_t index) {
  using O = Ordered<A>;
  using Bits = typename O::Bits;
  const Bits bits = score != score ? O::kNaN : bit_cast<Bits>(score + A(0));
  const Bits ordered = bits & O::kSign ? Bits(~bits) : Bits(bits | O::kSign);
  return Pair<A>(ordered) << 8 * sizeof(A) | Pair<A>(Bits(~Bits(index)));
}
template <class A>
MK_INLINE A score_of(Pair<A> pair) {
  using O = Ordered<A>;
  using Bits = typename O::Bits;
  const Bits ordered = Bits(pair >> 8 * sizeof(A));
  return bit_cast<A>(ordered & O::kSign ? Bits(ordered ^ O::kSign) : Bits(~ordered));
}
template <class A>
MK_INLINE int64_t index_of(Pair<A> pair) {
  using Bits = typename Ordered<A>::Bits;
  return int64_t(Bits(~Bits(pair)));
}

template <class P>
MK_INLINE void exchange(P& a, P& b) {
  const P t = a;
  a = b, b = t;
}

template <class P>
void insertion_sort(P* pairs, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const P x = pairs[i];
    int64_t j = i;
    for (; j > 0 && pairs[j - 1] < x; j--) pairs[j] = pairs[j - 1];
    pairs[j] = x;
  }
}

// Larger pairs than a pivot before it, the others behind; returns its place. No branch depends on a comparison.
template <class P>
int64_t partition(P* pairs, int64_t n) {
  P &a = pairs[0], &b = pairs[n / 2], &c = pairs[n - 1];
  if (a < b) exchange(a, b);  // the median of three goes last
  if (b < c) exchange(b, c);
  if (a < b) exchange(a, b);
  exchange(b, c);
  const P pivot = c;
  int64_t place = 0;
  for (int64_t i = 0; i < n - 1; i++) {
    const P x = pairs[i];
    pairs[i] = pairs[place];
    pairs[place] = x;
    place += x > pivot;
  }
  exchange(pairs[place], pairs[n - 1]);
  return place;
}

constexpr int64_t kFewPairs = 16;

// The k best come first, in any order but for the last of them, which stands at k - 1.
template <class P>
void select_best(P* pairs, int64_t n, int64_t k) {
  while (n > kFewPairs) {
    const int64_t place = partition(pairs, n);
    if (place == k - 1) return;
    if (place > k - 1) {
      n = place;
    } else {
      pairs += place + 1, n -= place + 1, k -= place + 1;
    }
  }
  insertion_sort(pairs, n);
}

template <class P>
void sort_best(P* pairs, int64_t n) {
  while (n > kFewPairs) {
    const int64_t place = partition(pairs, n), after = n - place - 1;
    if (place < after) {
      sort_best(pairs, place);
      pairs += place + 1, n = after;
    } else {
      sort_best(pairs + place + 1, after);
      n = place;
    }
  }
  insertion_sort(pairs, n);
}

// The best pairs seen so far of scores that come by increasing index, each with room for `capacity` > k pairs. A score
// is offered only if it is not <= the threshold: NaN is, -inf never.
template <class A>
MK_INLINE void offer(Pair<A>* pairs, int64_t& count, A& threshold, int64_t k, int64_t capacity, A score,
                     int64_t index) {
  pairs[count++] = pair_of(score, index);
  if (count < capacity) return;
  select_best(pairs, count, k);
  count = k;
  threshold = score_of<A>(pairs[k - 1]);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
