// AVX-512 (F, BW, DQ, VL) vectors; the vocabulary is described in csrc/README.md, the functions of analysis in
// generic/vec_math.inl.h.
#pragma once
#include <immintrin.h>

#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class T>
struct Vec;

struct Mask16 {
  __mmask16 m;
};
MK_INLINE Mask16 operator&(Mask16 a, Mask16 b) { return {__mmask16(a.m & b.m)}; }
MK_INLINE Mask16 operator|(Mask16 a, Mask16 b) { return {__mmask16(a.m | b.m)}; }
MK_INLINE Mask16 operator!(Mask16 a) { return {__mmask16(~a.m)}; }
MK_INLINE bool any(Mask16 a) { return a.m != 0; }
struct Mask8 {
  __mmask8 m;
};
MK_INLINE Mask8 operator&(Mask8 a, Mask8 b) { return {__mmask8(a.m & b.m)}; }
MK_INLINE Mask8 operator|(Mask8 a, Mask8 b) { return {__mmask8(a.m | b.m)}; }
MK_INLINE Mask8 operator!(Mask8 a) { return {__mmask8(~a.m)}; }
MK_INLINE bool any(Mask8 a) { return a.m != 0; }

MK_INLINE __m256i round_bfloat16(__m512 v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);  // one instruction instead of eight; denormals (below 1.2e-38) become 0
#else
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
MK_INLINE __m512 widen_bfloat16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <>
struct Vec<float> {
  using T = float;
  using Mask = Mask16;
  static constexpr int64_t kLanes = 16;
  __m512 v;

  static MK_INLINE __mmask16 first(int64_t n) { return __mmask16(_bzhi_u32(0xffff, unsigned(n))); }
  static MK_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static MK_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static MK_INLINE Mask first_lanes(int64_t n) { return {first(n)}; }
  static MK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static MK_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static MK_INLINE Vec load(const bfloat16* p) { return {widen_bfloat16(_mm256_loadu_si256((const __m256i*)p))}; }
  static MK_INLINE Vec load(const bfloat16* p, int64_t n) {
    return {widen_bfloat16(_mm256_maskz_loadu_epi16(first(n), p))};
  }
  static MK_INLINE Vec load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static MK_INLINE Vec load(const float16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }
  static MK_INLINE Vec load(const signed8<float>* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  static MK_INLINE Vec load(const signed8<float>* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  MK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  MK_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  MK_INLINE void store(bfloat16* p) const { _mm256_storeu_si256((__m256i*)p, round_bfloat16(v)); }
  MK_INLINE void store(bfloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), round_bfloat16(v)); }
  MK_INLINE void store(float16* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  MK_INLINE void store(float16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  MK_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }  // p aligned to the vector
};

MK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
MK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
MK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
MK_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm512_sqrt_ps(a.v)}; }
MK_INLINE Vec<float> abs(Vec<float> a) { return {_mm512_abs_ps(a.v)}; }
MK_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(0x7fffffff), _mm512_castps_si512(magnitude.v),
                                                        _mm512_castps_si512(sign.v), 0xca))};
}
MK_INLINE Vec<float> round(Vec<float> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MK_INLINE Vec<float> scale(Vec<float> a, Vec<float> n) { return {_mm512_scalef_ps(a.v, n.v)}; }
MK_INLINE Vec<float> exponent(Vec<float> a) { return {_mm512_getexp_ps(a.v)}; }
MK_INLINE Vec<float> mantissa(Vec<float> a) { return {_mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan)}; }
MK_INLINE Mask16 operator<(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
MK_INLINE Mask16 operator<=(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
MK_INLINE Mask16 operator>(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
MK_INLINE Mask16 operator>=(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
MK_INLINE Mask16 operator==(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
MK_INLINE Vec<float> select(Mask16 m, Vec<float> a, Vec<float> b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
MK_INLINE float reduce_add(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
MK_INLINE float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }

// One step of adding lanes up: a and b folded into one vector, whose lanes with a bit in kOfB belong to b. The blend
// and the permutation together hold every lane once, and a blend does not compete with the shuffles for their one port.
template <int kOfB>
MK_INLINE __m512 fold_lanes(__m512 a, __m512 b, __m512i other) {
  return _mm512_add_ps(_mm512_mask_blend_ps(__mmask16(kOfB), a, b), _mm512_permutex2var_ps(a, other, b));
}
// Lane i = the sum of the 16 floats at rows + 16 i.
MK_INLINE Vec<float> reduce_add_each(const float* rows) {
  // other[i] is the lane of a (b: + 16) that lies across lane i at distance 8, 4, 2 or 1.
  const __m512i by8 = _mm512_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  const __m512i by4 = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  const __m512i by2 = _mm512_setr_epi32(2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  const __m512i by1 = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  __m512 v[8];
  for (int i = 0; i < 8; i++)
    v[i] = fold_lanes<0xff00>(_mm512_loadu_ps(rows + 16 * i), _mm512_loadu_ps(rows + 16 * (i + 8)), by8);
  for (int i = 0; i < 4; i++) v[i] = fold_lanes<0xf0f0>(v[i], v[i + 4], by4);
  for (int i = 0; i < 2; i++) v[i] = fold_lanes<0xcccc>(v[i], v[i + 2], by2);
  return {fold_lanes<0xaaaa>(v[0], v[1], by1)};
}

template <>
struct Vec<double> {
  using T = double;
  using Mask = Mask8;
  static constexpr int64_t kLanes = 8;
  __m512d v;

  static MK_INLINE __mmask8 first(int64_t n) { return __mmask8(_bzhi_u32(0xff, unsigned(n))); }
  static MK_INLINE Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static MK_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static MK_INLINE Mask first_lanes(int64_t n) { return {first(n)}; }
  static MK_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static MK_INLINE Vec load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  static MK_INLINE Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static MK_INLINE Vec load(const float* p, int64_t n) { return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first(n), p))}; }
  static MK_INLINE Vec load(const signed8<double>* p) {
    return {_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static MK_INLINE Vec load(const signed8<double>* p, int64_t n) {
    return {_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  MK_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  MK_INLINE void store(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  MK_INLINE void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  MK_INLINE void store(float* p, int64_t n) const { _mm256_mask_storeu_ps(p, first(n), _mm512_cvtpd_ps(v)); }
  MK_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }
};

MK_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
MK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
MK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
MK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
MK_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm512_sqrt_pd(a.v)}; }
MK_INLINE Vec<double> abs(Vec<double> a) { return {_mm512_abs_pd(a.v)}; }
MK_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {_mm512_castsi512_pd(_mm512_ternarylogic_epi64(
      _mm512_set1_epi64(0x7fffffffffffffff), _mm512_castpd_si512(magnitude.v), _mm512_castpd_si512(sign.v), 0xca))};
}
MK_INLINE Vec<double> round(Vec<double> a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MK_INLINE Vec<double> scale(Vec<double> a, Vec<double> n) { return {_mm512_scalef_pd(a.v, n.v)}; }
MK_INLINE Vec<double> exponent(Vec<double> a) { return {_mm512_getexp_pd(a.v)}; }
MK_INLINE Vec<double> mantissa(Vec<double> a) { return {_mm512_getmant_pd(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan)}; }
MK_INLINE Mask8 operator<(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
MK_INLINE Mask8 operator<=(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
MK_INLINE Mask8 operator>(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
MK_INLINE Mask8 operator>=(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ)}; }
MK_INLINE Mask8 operator==(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
MK_INLINE Vec<double> select(Mask8 m, Vec<double> a, Vec<double> b) { return {_mm512_mask_blend_pd(m.m, b.v, a.v)}; }
MK_INLINE double reduce_add(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
MK_INLINE double reduce_max(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }

MK_INLINE Vec<double> reduce_add_each(const double* rows) {
  __m512d q[2];
  for (int t = 0; t < 2; t++) {
    const __m512d a = _mm512_loadu_pd(rows + 8 * t), b = _mm512_loadu_pd(rows + 8 * (t + 2));
    const __m512d c = _mm512_loadu_pd(rows + 8 * (t + 4)), d = _mm512_loadu_pd(rows + 8 * (t + 6));
    const __m512d x = _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
    const __m512d y = _mm512_add_pd(_mm512_shuffle_f64x2(c, d, 0x44), _mm512_shuffle_f64x2(c, d, 0xee));
    q[t] = _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x88), _mm512_shuffle_f64x2(x, y, 0xdd));
  }
  return {_mm512_add_pd(_mm512_unpacklo_pd(q[0], q[1]), _mm512_unpackhi_pd(q[0], q[1]))};
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL

#include "cpu/generic/vec_math.inl.h"
#include "cpu/avx512/log.h"
