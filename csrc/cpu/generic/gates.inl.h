// Gate activations of recurrent cells: sigmoid and tanh of vec_math with the division replaced by `reciprocal`, which
// is several times cheaper where a level has an approximate one. Within about 3 ulp; 0, 1 and -1 are reached exactly;
// NaN stays NaN.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// Of a number in [1, 2^126]. One Newton step on the 14-bit estimate leaves about 1 ulp.
#if defined(__AVX512F__)
MK_INLINE Vec<float> reciprocal(Vec<float> a) {
  const __m512 y = _mm512_rcp14_ps(a.v);
  return {_mm512_fmadd_ps(y, _mm512_fnmadd_ps(a.v, y, _mm512_set1_ps(1.0f)), y)};
}
MK_INLINE Vec<double> reciprocal(Vec<double> a) { return Vec<double>::set1(1.0) / a; }
#else
template <class T>
MK_INLINE Vec<T> reciprocal(Vec<T> a) {
  return Vec<T>::set1(T(1)) / a;
}
#endif

template <class T>
MK_INLINE Vec<T> gate_sigmoid(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(max(V::set1(Constants<T>::kExpMin), copysign(x, V::set1(T(-1)))), n), e = scale(one + p, n);
  return select(x < V::zero(), e, one) * reciprocal(one + e);
}

template <class T>
MK_INLINE Vec<T> gate_tanh(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(min(V::set1(Constants<T>::kTanhMax), abs(x + x)), n), power = scale(one, n);
  const V e = fma(p, power, power - one);
  return copysign(e * reciprocal(e + V::set1(T(2))), x);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
