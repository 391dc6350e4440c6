// Layer norm of one row in the accumulation type: two passes, sums in four vectors in a fixed order.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr double kNormEpsilon = 1e-5;

// sum of term(j, part) over j < n; the lanes past n are ignored.
template <class A, class Term>
MK_INLINE A sum_of(int64_t n, const Term& term) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L)
    for (int64_t l = 0; l < 4; l++) sum[l] = sum[l] + term(j + l * L, Full{});
  for (; j + L <= n; j += L) sum[0] = sum[0] + term(j, Full{});
  if (j < n) sum[1] = sum[1] + in_part(term(j, Tail{n - j}), V::zero(), Tail{n - j});
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class A>
struct Moments {
  A mean, scale;  // scale: 1 / deviation
};

template <class A>
MK_INLINE Moments<A> moments(const A* x, int64_t n) {
  if (n == 0) return {0, 1};
  using V = Vec<A>;
  // From the first number, so that a constant row has variance 0 exactly.
  const V origin = V::set1(x[0]);
  const A shift = sum_of<A>(n, [&](int64_t j, auto part) { return load<V>(x + j, part) - origin; }) / A(n);
  const A mean = x[0] + shift;
  const V centre = V::set1(mean);
  const A squares = sum_of<A>(n, [&](int64_t j, auto part) {
    const V d = load<V>(x + j, part) - centre;
    return d * d;
  });
  return {mean, A(1) / (sizeof(A) == 4 ? A(__builtin_sqrtf(float(squares / A(n) + A(kNormEpsilon))))
                                       : A(__builtin_sqrt(squares / A(n) + A(kNormEpsilon))))};
}

// out = the gradient of the row before layer norm, or it added to out; d: after it, n: the normalised row.
template <class A, bool kAdd>
MK_INLINE void norm_backward(const A* d, const A* gamma, const A* normal, A scale, int64_t n, A* out) {
  using V = Vec<A>;
  const auto term = [&](int64_t j, auto part) { return load<V>(d + j, part) * load<V>(gamma + j, part); };
  const V mean = V::set1(sum_of<A>(n, term) / A(n));
  const V along =
      V::set1(sum_of<A>(n, [&](int64_t j, auto part) { return term(j, part) * load<V>(normal + j, part); }) / A(n));
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    const V g = V::set1(scale) * (term(j, part) - mean - load<V>(normal + j, part) * along);
    store(kAdd ? load<V>(out + j, part) + g : g, out + j, part);
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
