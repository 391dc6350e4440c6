// Functions of analysis and loop helpers, written once against the primitives of a level's vec.h (included at its end).
//
// exp, sigmoid, tanh, log: float within about 2 ulp, double within about 2 ulp, in all of the range: exp(-inf) = 0,
// denormal results are rounded, overflow gives inf, NaN stays NaN. Coefficients: Chebyshev fits computed for this file
// with mpmath.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// Whole vectors and the rest of a run, so that a loop body is written once: for_each_vec<V>(n, [&](int64_t i, auto
// part) {
//   store(load<V>(x + i, part) * two, y + i, part); });
struct Full {};
struct Tail {
  int64_t n;
};
template <class V, class S>
MK_INLINE V load(const S* p, Full) {
  return V::load(p);
}
template <class V, class S>
MK_INLINE V load(const S* p, Tail part) {
  return V::load(p, part.n);
}
template <class T, class S>
MK_INLINE void store(Vec<T> v, S* p, Full) {
  v.store(p);
}
template <class T, class S>
MK_INLINE void store(Vec<T> v, S* p, Tail part) {
  v.store(p, part.n);
}
// v in the lanes that exist, `other` in the rest.
template <class T>
MK_INLINE Vec<T> in_part(Vec<T> v, Vec<T>, Full) {
  return v;
}
template <class T>
MK_INLINE Vec<T> in_part(Vec<T> v, Vec<T> other, Tail part) {
  return select(Vec<T>::first_lanes(part.n), v, other);
}

template <class V, class Body>
MK_INLINE void for_each_vec(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) body(i, Full{});
  if (i < n) body(i, Tail{n - i});
}

template <class T>
MK_INLINE Vec<T> operator-(Vec<T> a) {
  return a * Vec<T>::set1(T(-1));
}

#if MK_SCALE_BY_HALVES
// a * 2^n for integral n. Two factors, so that results below the normal range are rounded once and 2^128 does not
// overflow early.
template <class T>
MK_INLINE Vec<T> scale(Vec<T> a, Vec<T> n) {
  const Vec<T> half = round(n * Vec<T>::set1(T(0.5)));
  return a * power_of_two(half) * power_of_two(n - half);
}
// Of a positive finite number, denormal ones included.
template <class T>
MK_INLINE Vec<T> exponent(Vec<T> a) {
  constexpr T kSmallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  const auto tiny = a < Vec<T>::set1(kSmallest);
  const Vec<T> normal = select(tiny, a * Vec<T>::set1(T(0x1p64)), a);
  return exponent_of_normal(normal) - select(tiny, Vec<T>::set1(T(64)), Vec<T>::zero());
}
template <class T>
MK_INLINE Vec<T> mantissa(Vec<T> a) {
  constexpr T kSmallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
  return mantissa_of_normal(select(a < Vec<T>::set1(kSmallest), a * Vec<T>::set1(T(0x1p64)), a));
}
#endif

template <class V, int N>
MK_INLINE V polynomial(V x, const typename V::T (&c)[N]) {  // highest power first
  V sum = V::set1(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; i++) sum = fma(sum, x, V::set1(c[i]));
  return sum;
}

template <class T>
struct Constants;
template <>
struct Constants<float> {
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.4286068203094172321e-6f;
  static constexpr float kExpMin = -105.0f, kExpMax = 90.0f, kTanhMax = 24.0f;
  static constexpr float kExp[6] = {0.00019890990824673653847f, 0.0013933649996309250429f, 0.0083333109254809008349f,
                                    0.041666464925285905408f,   0.16666666681623231402f,   0.50000000134658092001f};
  // Of (log(1 + f) - f + f^2 / 2) / f^3, the even and the odd powers of f.
  static constexpr float kLogEven[5] = {0.069716114714511778317f, 0.11685419923486739308f, 0.14249057645697480404f,
                                        0.20000715748892101743f, 0.33333331180030048052f};
  static constexpr float kLogOdd[4] = {-0.11479733846637635556f, -0.12425687331451106113f, -0.16667802319501254074f,
                                       -0.24999996957950882045f};
};
template <>
struct Constants<double> {
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 1.908214929270587816144266e-10;
  static constexpr double kExpMin = -746.0, kExpMax = 710.0, kTanhMax = 48.0;
  static constexpr double kExp[11] = {2.0914686968086877232e-9,
                                      2.5105217004720745163e-8,
                                      2.7557273643110295328e-7,
                                      2.755725540020642443e-6,
                                      0.000024801587325547741216,
                                      0.00019841269874820625271,
                                      0.0013888888888883748305,
                                      0.0083333333333261351258,
                                      0.041666666666666669755,
                                      0.16666666666666670991,
                                      0.5};
  static constexpr double kLog[8] = {0.13088034850927553675, 0.13268638369266823894, 0.15386244737621666605,
                                     0.18181795547521136235, 0.22222222392581045097, 0.28571428570799785031,
                                     0.40000000000000883236, 0.66666666666666666463};
};

// x = n ln2 + r with |r| <= ln2/2, and expm1(r) with an error small relative to itself.
template <class V>
MK_INLINE V reduced_expm1(V x, V& n) {
  using C = Constants<typename V::T>;
  n = round(x * V::set1(typename V::T(1.4426950408889634074)));
  const V r = fma(n, V::set1(-C::kLn2Low), fma(n, V::set1(-C::kLn2High), x));
  return fma(r * r, polynomial(r, C::kExp), r);
}

template <class T>
MK_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  V n;
  // max and min return their second argument for NaN, so NaN passes.
  const V clamped = min(V::set1(Constants<T>::kExpMax), max(V::set1(Constants<T>::kExpMin), x));
  const V p = reduced_expm1(clamped, n);
  return scale(V::set1(T(1)) + p, n);
}

template <class T>
MK_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V e = exp(copysign(x, V::set1(T(-1)))), one = V::set1(T(1));
  return select(x < V::zero(), e, one) / (one + e);
}

// expm1(2|x|) / (expm1(2|x|) + 2): small relative error around 0 without a second polynomial.
template <class T>
MK_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  V n;
  const V one = V::set1(T(1));
  const V p = reduced_expm1(min(V::set1(Constants<T>::kTanhMax), abs(x + x)), n), power = scale(one, n);
  const V e = fma(p, power, power - one);
  return copysign(e / (e + V::set1(T(2))), x);
}

// log(1 + f) - f + f^2 / 2 + low for 1 + f from sqrt(1/2) to sqrt(2). float: a polynomial; a division takes as long as
// ten of its terms. double, whose polynomial would be twice as long: by s = f / (2 + f).
MK_INLINE Vec<float> log_tail(Vec<float> f, Vec<float> square, Vec<float> low) {
  const Vec<float> even = polynomial(square, Constants<float>::kLogEven);
  return fma(f * square, fma(f, polynomial(square, Constants<float>::kLogOdd), even), low);
}
MK_INLINE Vec<double> log_tail(Vec<double> f, Vec<double> square, Vec<double> low) {
  using V = Vec<double>;
  const V s = f / (f + V::set1(2)), z = s * s;
  return fma(s, fma(z, polynomial(z, Constants<double>::kLog), V::set1(0.5) * square), low);
}

template <class T>
MK_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  using C = Constants<T>;
  const V one = V::set1(T(1)), half = V::set1(T(0.5));
  V m = mantissa(x), e = exponent(x);
  const auto big = m > V::set1(T(1.4142135623730950488));
  m = select(big, m * half, m);
  e = select(big, e + one, e);
  const V f = m - one, square = f * f;
  const V tail = log_tail(f, square, e * V::set1(C::kLn2Low));
  const V out = fma(e, V::set1(C::kLn2High), f - (half * square - tail));
#if MK_SCALE_BY_HALVES
  const V infinity = V::set1(T(__builtin_inf()));
  const V some = select(x == V::zero(), V::zero() - infinity, select(x == infinity, infinity, out));
  return select(x >= V::zero(), some, V::set1(T(__builtin_nan(""))));
#else
  return out;  // the exponents of 0 and of infinity are infinite, the mantissa of what is negative is no number
#endif
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
