// Gate activations of recurrent cells: sigmoid and tanh of vec_math with the division replaced by `quotient`, which is
// several times cheaper where a level estimates reciprocals. Within 2 ulp; 0, 1 and -1 are reached exactly; NaN stays
// NaN.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// n / d for d in [1, 2^126] and n <= d. The residual of the first quotient corrects the 14-bit estimate of 1 / d.
#if defined(__AVX512F__)
MK_INLINE Vec<float> quotient(Vec<float> n, Vec<float> d) {
  const __m512 r = _mm512_rcp14_ps(d.v), q = _mm512_mul_ps(n.v, r);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(q, d.v, n.v), r, q)};
}
MK_INLINE Vec<double> quotient(Vec<double> n, Vec<double> d) { return n / d; }
#else
template <class T>
MK_INLINE Vec<T> quotient(Vec<T> n, Vec<T> d) { return n / d; }
#endif

template <class T>
MK_INLINE Vec<T> gate_sigmoid(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(max(V::set1(Constants<T>::kExpMin), copysign(x, V::set1(T(-1)))), n), e = scale(one + p, n);
  return quotient(select(x < V::zero(), e, one), one + e);
}

template <class T>
MK_INLINE Vec<T> gate_tanh(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(min(V::set1(Constants<T>::kTanhMax), abs(x + x)), n), power = scale(one, n);
  const V e = fma(p, power, power - one);
  return copysign(quotient(e, e + V::set1(T(2))), x);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
