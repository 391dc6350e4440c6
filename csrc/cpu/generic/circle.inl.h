// What the addressing by location does with a row of weights that lies in the cache: a circular shift, and sharpening
// of what is over the largest weight. A "circle" holds the row with `reach` elements of its other end on either side,
// so that no pass over it needs a remainder.
#pragma once
#include "cpu/generic/rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The row lies at circle + reach; both margins are filled, each from what is `rows` further, so reach may exceed rows.
template <class A>
MK_INLINE void close_circle(A* circle, int64_t rows, int64_t reach) {
  for (int64_t k = reach - 1; k >= 0; k--) circle[k] = circle[k + rows];
  for (int64_t k = reach + rows; k < 2 * reach + rows; k++) circle[k] = circle[k - rows];
}

// sum_t taps[t] from[t * kStep], N vectors at once; the caller stores them.
template <int kStep, int N, class V, class Part>
MK_INLINE void convolve_columns(const typename V::T* from, const typename V::T* taps, int64_t count, V* sum,
                                Part part) {
  for (int l = 0; l < N; l++) sum[l] = V::zero();
  for (int64_t t = 0; t < count; t++) {
    const V tap = V::set1(taps[t]);
    for (int l = 0; l < N; l++) sum[l] = fma(tap, load<V>(from + t * kStep + l * V::kLanes, part), sum[l]);
  }
}

// body(i, sums, part) for each vector of sums[i] = sum_t taps[t] from[i + t * kStep].
template <int kStep, class A, class Body>
MK_INLINE void convolve(const A* from, const A* taps, int64_t count, int64_t rows, const Body& body) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  int64_t i = 0;
  for (; i + 4 * L <= rows; i += 4 * L) {
    V sum[4];
    convolve_columns<kStep, 4>(from + i, taps, count, sum, Full{});
    for (int l = 0; l < 4; l++) body(i + l * L, sum[l], Full{});
  }
  for (; i < rows; i += L) {
    V sum[1];
    if (i + L <= rows) {
      convolve_columns<kStep, 1>(from + i, taps, count, sum, Full{});
      body(i, sum[0], Full{});
    } else {
      const Tail part{rows - i};
      convolve_columns<kStep, 1>(from + i, taps, count, sum, part);
      body(i, sum[0], part);
    }
  }
}

// dtaps[t] = sum_i d[i] from[i - t]: four taps at a time share the load of d.
template <class A>
MK_INLINE void convolve_taps(const A* from, const A* d, int64_t count, int64_t rows, A* dtaps) {
  using V = Vec<A>;
  const auto group = [&](int64_t t, auto number) {
    constexpr int N = decltype(number)::value;
    V sum[N];
    for (int l = 0; l < N; l++) sum[l] = V::zero();
    for_each_vec<V>(rows, [&](int64_t i, auto part) {
      const V slope = load<V>(d + i, part);
      for (int l = 0; l < N; l++) sum[l] = fma(slope, load<V>(from + i - t - l, part), sum[l]);
    });
    for (int l = 0; l < N; l++) dtaps[t + l] = reduce_add(sum[l]);
  };
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) group(t, Count<4>{});
  if (t + 3 == count) return group(t, Count<3>{});
  for (; t < count; t++) group(t, Count<1>{});
}

// shifted[i] = sum_t taps[t] circle[i + 2 reach - t], and its largest element (1 where none is positive).
template <class A>
MK_INLINE A shift_row(const A* circle, const A* taps, int64_t count, int64_t rows, A* shifted) {
  using V = Vec<A>;
  V top = V::zero();
  convolve<-1>(circle + count - 1, taps, count, rows, [&](int64_t i, V sum, auto part) {
    store(sum, shifted + i, part);
    top = max(top, in_part(sum, V::zero(), part));
  });
  const A largest = reduce_max(top);
  return largest == 0 ? A(1) : largest;
}

// Vectors of shifted weights over the largest one.
template <class V>
struct Sharpening {
  V scale, minus, inverse, above;

  // A power of two first, so that a largest weight below the normal range has a reciprocal.
  MK_INLINE Sharpening(typename V::T top, typename V::T sharpen) {
    using A = typename V::T;
    constexpr A kTiny = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-900), kUp = sizeof(A) == 4 ? A(0x1p100) : A(0x1p900);
    const A factor = top < kTiny ? kUp : A(1);
    scale = V::set1(factor), minus = V::set1(-top * factor), inverse = V::set1(1 / (top * factor));
    above = V::set1(sharpen - 1);
  }

  MK_INLINE V ratio(V shifted) const {
    const V scaled = shifted * scale, quotient = scaled * inverse;
    // Rounded as a division does, at a quarter of its time: exactly 1 for the largest.
    return fma(fma(quotient, minus, scaled), inverse, quotient);
  }
};

// A row of shifted weights over its largest, in place, and the logarithms: 0 and 0 where a weight is not positive. NaN
// stays NaN. A pass of its own: with the exponential behind the logarithm in one, few vectors are in flight at a time.
template <class A>
MK_INLINE void take_logarithms(A* shifted, int64_t rows, const Sharpening<Vec<A>>& by, A* logarithm) {
  using V = Vec<A>;
  for_each_vec<V>(rows, [&](int64_t i, auto part) {
    const V ratio = by.ratio(load<V>(shifted + i, part));
    const auto positive = !(ratio <= V::zero());
    store(select(positive, ratio, V::zero()), shifted + i, part);
    store(log(select(positive, ratio, V::set1(1))), logarithm + i, part);
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
