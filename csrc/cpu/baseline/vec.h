// Vectors of 16 bytes in the compiler's own vector extension: SSE2 on x86-64, NEON on Arm. The vocabulary is described
// in csrc/README.md, the functions of analysis in generic/vec_math.inl.h.
#pragma once
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class T>
struct Raw;
template <>
struct Raw<float> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr int32_t kBias = 127, kMantissa = 23, kMantissaMask = 0x7fffff, kMagnitude = 0x7fffffff;
  static constexpr float kMagic = 0x1.8p23f;
};
template <>
struct Raw<double> {
  typedef double F __attribute__((vector_size(16)));
  typedef int64_t I __attribute__((vector_size(16)));
  typedef uint64_t U __attribute__((vector_size(16)));
  static constexpr int64_t kBias = 1023, kMantissa = 52, kMantissaMask = 0xfffffffffffff,
                           kMagnitude = 0x7fffffffffffffff;
  static constexpr double kMagic = 0x1.8p52;
};

template <class T>
struct LaneMask {
  typename Raw<T>::I m;
};
template <class T>
MK_INLINE LaneMask<T> operator&(LaneMask<T> a, LaneMask<T> b) {
  return {a.m & b.m};
}
template <class T>
MK_INLINE LaneMask<T> operator|(LaneMask<T> a, LaneMask<T> b) {
  return {a.m | b.m};
}
template <class T>
MK_INLINE LaneMask<T> operator!(LaneMask<T> a) {
  return {~a.m};
}
template <class T>
MK_INLINE bool any(LaneMask<T> a) {
  bool out = false;
  for (int i = 0; i < int(16 / sizeof(T)); i++) out |= a.m[i] != 0;
  return out;
}

template <class Scalar>
struct Vec {
  using T = Scalar;
  using Mask = LaneMask<T>;
  static constexpr int64_t kLanes = 16 / sizeof(T);
  typename Raw<T>::F v;

  static MK_INLINE Vec set1(T x) { return {x - typename Raw<T>::F{}}; }
  static MK_INLINE Vec zero() { return {typename Raw<T>::F{}}; }
  static MK_INLINE Mask first_lanes(int64_t n) {
    Mask out;
    for (int i = 0; i < kLanes; i++) out.m[i] = i < n ? -1 : 0;
    return out;
  }
  static MK_INLINE Vec load(const T* p) {
    Vec out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
  }
  template <class S>
  static MK_INLINE Vec load(const S* p) {
    Vec out;
    for (int i = 0; i < kLanes; i++) out.v[i] = T(to_float(p[i]));
    return out;
  }
  template <class S>
  static MK_INLINE Vec load(const S* p, int64_t n) {
    Vec out = zero();
    for (int64_t i = 0; i < n; i++) out.v[i] = T(to_float(p[i]));
    return out;
  }
  MK_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof v); }
  template <class S>
  MK_INLINE void store(S* p) const {
    for (int i = 0; i < kLanes; i++) p[i] = convert<S>::from(v[i]);
  }
  template <class S>
  MK_INLINE void store(S* p, int64_t n) const {
    for (int64_t i = 0; i < n; i++) p[i] = convert<S>::from(v[i]);
  }
  MK_INLINE void stream(T* p) const { store(p); }
};

#define MK_BINARY(op)                                \
  template <class T>                                 \
  MK_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    return {a.v op b.v};                             \
  }
MK_BINARY(+)
MK_BINARY(-)
MK_BINARY(*)
MK_BINARY(/)
#undef MK_BINARY
#define MK_COMPARE(op)                                    \
  template <class T>                                      \
  MK_INLINE LaneMask<T> operator op(Vec<T> a, Vec<T> b) { \
    return {a.v op b.v};                                  \
  }
MK_COMPARE(<)
MK_COMPARE(<=)
MK_COMPARE(>)
MK_COMPARE(>=)
MK_COMPARE(==)
#undef MK_COMPARE

template <class T>
MK_INLINE typename Raw<T>::I bits_of(Vec<T> a) {
  return (typename Raw<T>::I)a.v;
}
template <class T>
MK_INLINE Vec<T> of_bits(typename Raw<T>::I bits) {
  return {(typename Raw<T>::F)bits};
}
// One rounding, as on every other level: SSE2 has no fma, but a product of floats is exact in double.
MK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__aarch64__)
  return {(Raw<float>::F)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  for (int i = 0; i < 4; i++) a.v[i] = float(double(a.v[i]) * double(b.v[i]) + double(c.v[i]));
  return a;
#endif
}
MK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__aarch64__)
  return {(Raw<double>::F)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
#else
  return {a.v * b.v + c.v};  // two roundings: exact ones would cost a library call
#endif
}
template <class T>
MK_INLINE Vec<T> select(LaneMask<T> m, Vec<T> a, Vec<T> b) {
  return of_bits<T>((m.m & bits_of(a)) | (~m.m & bits_of(b)));
}
template <class T>
MK_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}
template <class T>
MK_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}
template <class T>
MK_INLINE Vec<T> sqrt(Vec<T> a) {
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return {(typename Raw<T>::F)_mm_sqrt_ps((__m128)a.v)};
  else
    return {(typename Raw<T>::F)_mm_sqrt_pd((__m128d)a.v)};
#else
  for (int i = 0; i < Vec<T>::kLanes; i++)
    a.v[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(a.v[i]))) : T(__builtin_sqrt(a.v[i]));
  return a;
#endif
}
template <class T>
MK_INLINE Vec<T> abs(Vec<T> a) {
  return of_bits<T>(bits_of(a) & Raw<T>::kMagnitude);
}
template <class T>
MK_INLINE Vec<T> copysign(Vec<T> magnitude, Vec<T> sign) {
  return of_bits<T>((bits_of(magnitude) & Raw<T>::kMagnitude) | (bits_of(sign) & ~Raw<T>::kMagnitude));
}
// Nearest even for |a| below 2^22 (2^51): what the functions of analysis need.
template <class T>
MK_INLINE Vec<T> round(Vec<T> a) {
  return {a.v + Raw<T>::kMagic - Raw<T>::kMagic};
}
// 2^n for integral n in the normal range: the sum leaves n in the low mantissa bits, the shift makes it an exponent.
template <class T>
MK_INLINE Vec<T> power_of_two(Vec<T> n) {
  typedef typename Raw<T>::U U;
  const U bias = (U)(typename Raw<T>::I{} + Raw<T>::kBias);
  const U sum = (U)bits_of(Vec<T>{n.v + Raw<T>::kMagic}) + bias;
  return of_bits<T>((typename Raw<T>::I)(sum << int(Raw<T>::kMantissa)));
}
template <class T>
MK_INLINE Vec<T> exponent_of_normal(Vec<T> a) {
  const auto biased = (bits_of(a) & Raw<T>::kMagnitude) >> int(Raw<T>::kMantissa);
  Vec<T> out;
  for (int i = 0; i < Vec<T>::kLanes; i++) out.v[i] = T(biased[i] - Raw<T>::kBias);
  return out;
}
template <class T>
MK_INLINE Vec<T> mantissa_of_normal(Vec<T> a) {
  return of_bits<T>((bits_of(a) & Raw<T>::kMantissaMask) | (Raw<T>::kBias << Raw<T>::kMantissa));
}
template <class T>
MK_INLINE T reduce_add(Vec<T> a) {
  if constexpr (sizeof(T) == 4)
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  else
    return a.v[0] + a.v[1];
}
template <class T>
MK_INLINE T reduce_max(Vec<T> a) {
  T out = a.v[0];
  for (int i = 1; i < Vec<T>::kLanes; i++) out = out > a.v[i] ? out : a.v[i];
  return out;
}

// Lane i = the sum of the kLanes elements at rows + kLanes i.
template <class T>
MK_INLINE Vec<T> reduce_add_each(const T* rows) {
  Vec<T> out;
  for (int i = 0; i < Vec<T>::kLanes; i++) out.v[i] = reduce_add(Vec<T>::load(rows + i * Vec<T>::kLanes));
  return out;
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL

#define MK_SCALE_BY_HALVES 1
#include "cpu/generic/vec_math.inl.h"
