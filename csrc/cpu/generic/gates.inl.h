// Gate activations of recurrent cells: sigmoid and tanh of vec_math with the division replaced by `quotient`, which is
// several times cheaper where a level estimates reciprocals. Within 2 ulp of the largest
// value; 0, 1 and -1 are reached exactly; NaN stays NaN.
#pragma once
#include <type_traits>

#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// n / d for d in [1, 2^126] and n <= d. The residual of the first quotient corrects the 14-bit estimate of 1 / d.
#if defined(__AVX512F__)
MK_INLINE Vec<float> quotient(Vec<float> n, Vec<float> d) {
  const __m512 r = _mm512_rcp14_ps(d.v), q = _mm512_mul_ps(n.v, r);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q, d.v, n.v), r, q)};
}
MK_INLINE Vec<double> quotient(Vec<double> n, Vec<double> d) { return n / d; }
MK_INLINE Vec<float> reciprocal(Vec<float> d) { return {_mm512_rcp14_ps(d.v)}; }  // to 14 bits at least
#else
template <class T>
MK_INLINE Vec<T> quotient(Vec<T> n, Vec<T> d) {
  return n / d;
}
template <class T>
MK_INLINE Vec<T> reciprocal(Vec<T> d) {
  return Vec<T>::set1(T(1)) / d;
}
#endif

template <class T>
MK_INLINE Vec<T> gate_sigmoid(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(max(V::set1(Constants<T>::kExpMin), copysign(x, V::set1(T(-1)))), n), e = scale(one + p, n);
  return quotient(select(x < V::zero(), e, one), one + e);
}
#if defined(__AVX512F__)
// 1 / (1 + 2^t), t = -x log2(e); what the roundings of t and of the sum lost is put back. 0 from where 2^t would leave
// the range: a gate that is closed must be so for what meets it, however large.
MK_INLINE Vec<float> gate_sigmoid(Vec<float> x) {
  using V = Vec<float>;
  // Chebyshev fit of 2^r on [-0.5, 0.5].
  constexpr float kPower[7] = {
      0.0001545316294f, 0.001339086336f, 0.009618082557f, 0.05550357114f, 0.2402265076f, 0.693147188f, 1.0f};
  const V scaled = V::set1(-1.4426950408889634f), clamped = min(V::set1(87.0f), max(V::set1(-87.0f), x));
  const V t = clamped * scaled, n = round(t), r = (t - n) + fma(clamped, scaled, V::zero() - t);
  const V one = V::set1(1.0f), power = scale(polynomial(r, kPower), n), d = one + power;
  const V lost = min(power, one) - (d - max(power, one)), estimate = reciprocal(d);
  const __m512 error = (fma(estimate, V::zero() - d, one) - estimate * lost).v;
  const __mmask16 open = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // NaN too
  return {_mm512_maskz_fmadd_ps(open, error, estimate.v, estimate.v)};
}
#endif

// expm1(2|x|) / (expm1(2|x|) + 2). kExact: what every rounding before the last one lost is put back, for results within
// 0.6 ulp; 16-bit results do not need it.
template <bool kExact = true, class T>
MK_INLINE Vec<T> gate_tanh(Vec<T> x) {
  using V = Vec<T>;
  const V one = V::set1(T(1)), two = V::set1(T(2));
  const V twice = min(V::set1(Constants<T>::kTanhMax), abs(x + x));
  V n;
  if constexpr (!kExact || sizeof(T) != 4) {
    const V p = reduced_expm1(twice, n), power = scale(one, n), e = fma(p, power, power - one);
    return copysign(quotient(e, e + two), x);
  } else {
    using C = Constants<T>;
    n = round(twice * V::set1(T(1.4426950408889634074)));
    const V high = fma(n, V::set1(-C::kLn2High), twice), low = n * V::set1(-C::kLn2Low), r = high + low;
    const V tail = fma(r * r, polynomial(r, C::kExp), low - (r - high)), p = r + tail, power = scale(one, n);
    const V e = fma(p, power, power - one), d = e + two;
    const V lost = fma(p, power, (power - one) - e) + (tail - (p - r)) * power;  // of e
    const V lost_d = min(e, two) - (d - max(e, two));                            // of d, besides
    const V estimate = reciprocal(d), q = e * estimate;
    return copysign(fma(fma(q, V::zero() - d, e) + (lost - q * (lost + lost_d)), estimate, q), x);
  }
}

#if defined(__AVX512F__)
// For results that are rounded to bfloat16 anyway: within 2^-12 relative, half the instructions; limits are those of
// the functions above after rounding, NaN stays NaN.
MK_INLINE Vec<float> coarse_sigmoid(Vec<float> x) {
  constexpr float kPower[4] = {0.07802451538f, 0.2260671872f, 0.6958335174f, 0.9999252222f};  // fit of 2^r on [0, 1]
  const Vec<float> t = x * Vec<float>::set1(-1.4426950408889634f);
  const Vec<float> r = {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // t - floor(t), 0 for inf
  return {_mm512_rcp14_ps((Vec<float>::set1(1.0f) + scale(polynomial(r, kPower), t)).v)};
}
MK_INLINE Vec<float> coarse_tanh(Vec<float> x) {
  using V = Vec<float>;
  // Rational fit of tanh(x) / x in x^2 on [0, 25]; tanh(5) rounds to 1.
  constexpr float kOver[3] = {0.0006705784185f, 0.1024182226f, 0.9999481716f};
  constexpr float kUnder[3] = {0.01282002533f, 0.4354332107f, 1.0f};
  x = min(V::set1(5.0f), max(V::set1(-5.0f), x));
  const V square = x * x;
  return x * polynomial(square, kOver) * V{_mm512_rcp14_ps(polynomial(square, kUnder).v)};
}
#endif

// 1 - x^2: the slope of tanh from its value.
template <class V>
MK_INLINE V tanh_slope(V x) {
  return fma(V::zero() - x, x, V::set1(1));
}

// As accurate as a result in T needs.
template <class T, class A>
MK_INLINE Vec<A> sigmoid_for(Vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>) return coarse_sigmoid(x);
#endif
  return gate_sigmoid(x);
}
template <class T, class A>
MK_INLINE Vec<A> tanh_for(Vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>) return coarse_tanh(x);
#endif
  return gate_tanh<(sizeof(T) > 2)>(x);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
