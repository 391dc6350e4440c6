// AVX2 + FMA + F16C vectors; the vocabulary is described in csrc/README.md, the functions of analysis in
// generic/vec_math.inl.h.
#pragma once
#include <immintrin.h>

#include "common/types.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class T>
struct Vec;

struct MaskF {
  __m256 m;
};
MK_INLINE MaskF operator&(MaskF a, MaskF b) { return {_mm256_and_ps(a.m, b.m)}; }
MK_INLINE MaskF operator|(MaskF a, MaskF b) { return {_mm256_or_ps(a.m, b.m)}; }
MK_INLINE MaskF operator!(MaskF a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
MK_INLINE bool any(MaskF a) { return _mm256_movemask_ps(a.m) != 0; }
struct MaskD {
  __m256d m;
};
MK_INLINE MaskD operator&(MaskD a, MaskD b) { return {_mm256_and_pd(a.m, b.m)}; }
MK_INLINE MaskD operator|(MaskD a, MaskD b) { return {_mm256_or_pd(a.m, b.m)}; }
MK_INLINE MaskD operator!(MaskD a) { return {_mm256_xor_pd(a.m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))}; }
MK_INLINE bool any(MaskD a) { return _mm256_movemask_pd(a.m) != 0; }

MK_INLINE __m128i round_bfloat16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i chosen =
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
  const __m256i high = _mm256_srli_epi32(chosen, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
MK_INLINE __m256 widen_bfloat16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// AVX2 has no masked access to 16-bit elements: a short tail goes through the stack and never touches memory past it.
MK_INLINE __m128i load_halves(const void* p, int64_t n) {
  uint16_t buffer[8] = {};
  for (int64_t i = 0; i < n; i++) buffer[i] = static_cast<const uint16_t*>(p)[i];
  return _mm_loadu_si128((const __m128i*)buffer);
}
MK_INLINE void store_halves(void* p, __m128i v, int64_t n) {
  uint16_t buffer[8];
  _mm_storeu_si128((__m128i*)buffer, v);
  for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(p)[i] = buffer[i];
}

template <>
struct Vec<float> {
  using T = float;
  using Mask = MaskF;
  static constexpr int64_t kLanes = 8;
  __m256 v;

  static MK_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static MK_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static MK_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static MK_INLINE Mask first_lanes(int64_t n) { return {_mm256_castsi256_ps(first(n))}; }
  static MK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static MK_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static MK_INLINE Vec load(const bfloat16* p) { return {widen_bfloat16(_mm_loadu_si128((const __m128i*)p))}; }
  static MK_INLINE Vec load(const bfloat16* p, int64_t n) { return {widen_bfloat16(load_halves(p, n))}; }
  static MK_INLINE Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static MK_INLINE Vec load(const float16* p, int64_t n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }
  static MK_INLINE Vec load(const signed8<float>* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static MK_INLINE Vec load(const signed8<float>* p, int64_t n) {
    signed8<float> buffer[8] = {};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
  }
  MK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  MK_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  MK_INLINE void store(bfloat16* p) const { _mm_storeu_si128((__m128i*)p, round_bfloat16(v)); }
  MK_INLINE void store(bfloat16* p, int64_t n) const { store_halves(p, round_bfloat16(v), n); }
  MK_INLINE void store(float16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  MK_INLINE void store(float16* p, int64_t n) const {
    store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), n);
  }
  MK_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }  // p aligned to the vector
};

MK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
MK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
MK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
MK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
MK_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm256_sqrt_ps(a.v)}; }
MK_INLINE Vec<float> abs(Vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
MK_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return {
      _mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), magnitude.v))};
}
MK_INLINE Vec<float> round(Vec<float> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in the normal range: the sum leaves n in the low mantissa bits, the shift makes it an exponent.
MK_INLINE Vec<float> power_of_two(Vec<float> n) {
  const __m256i bits = _mm256_castps_si256(_mm256_add_ps(n.v, _mm256_set1_ps(0x1.8p23f)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(127)), 23))};
}
MK_INLINE Vec<float> exponent_of_normal(Vec<float> a) {
  const __m256i bits = _mm256_srli_epi32(_mm256_slli_epi32(_mm256_castps_si256(a.v), 1), 24);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(127)))};
}
MK_INLINE Vec<float> mantissa_of_normal(Vec<float> a) {
  return {_mm256_or_ps(_mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), _mm256_set1_ps(1.0f))};
}
MK_INLINE MaskF operator<(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
MK_INLINE MaskF operator<=(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
MK_INLINE MaskF operator>(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
MK_INLINE MaskF operator>=(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
MK_INLINE MaskF operator==(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
MK_INLINE Vec<float> select(MaskF m, Vec<float> a, Vec<float> b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
MK_INLINE float reduce_add(Vec<float> a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
MK_INLINE float reduce_max(Vec<float> a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Lane i = the sum of the 8 floats at rows + 8 i.
MK_INLINE Vec<float> reduce_add_each(const float* rows) {
  __m256 p[4];
  for (int t = 0; t < 4; t++) {
    const __m256 a = _mm256_loadu_ps(rows + 8 * t), b = _mm256_loadu_ps(rows + 8 * (t + 4));
    p[t] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  const __m256 g = _mm256_add_ps(_mm256_shuffle_ps(p[0], p[1], 0x44), _mm256_shuffle_ps(p[0], p[1], 0xee));
  const __m256 h = _mm256_add_ps(_mm256_shuffle_ps(p[2], p[3], 0x44), _mm256_shuffle_ps(p[2], p[3], 0xee));
  return {_mm256_add_ps(_mm256_shuffle_ps(g, h, 0x88), _mm256_shuffle_ps(g, h, 0xdd))};
}

template <>
struct Vec<double> {
  using T = double;
  using Mask = MaskD;
  static constexpr int64_t kLanes = 4;
  __m256d v;

  static MK_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static MK_INLINE __m128i first4(int64_t n) {
    return _mm_cmpgt_epi32(_mm_set1_epi32(int(n)), _mm_setr_epi32(0, 1, 2, 3));
  }
  static MK_INLINE Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static MK_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static MK_INLINE Mask first_lanes(int64_t n) { return {_mm256_castsi256_pd(first(n))}; }
  static MK_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static MK_INLINE Vec load(const double* p, int64_t n) { return {_mm256_maskload_pd(p, first(n))}; }
  static MK_INLINE Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static MK_INLINE Vec load(const float* p, int64_t n) { return {_mm256_cvtps_pd(_mm_maskload_ps(p, first4(n)))}; }
  static MK_INLINE Vec load(const signed8<double>* p) {
    return {_mm256_cvtepi32_pd(_mm_cvtepi8_epi32(_mm_loadu_si32(p)))};
  }
  static MK_INLINE Vec load(const signed8<double>* p, int64_t n) {
    signed8<double> buffer[4] = {};
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
  }
  MK_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  MK_INLINE void store(double* p, int64_t n) const { _mm256_maskstore_pd(p, first(n), v); }
  MK_INLINE void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  MK_INLINE void store(float* p, int64_t n) const { _mm_maskstore_ps(p, first4(n), _mm256_cvtpd_ps(v)); }
  MK_INLINE void stream(double* p) const { _mm256_stream_pd(p, v); }
};

MK_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
MK_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
MK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
MK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
MK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
MK_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm256_sqrt_pd(a.v)}; }
MK_INLINE Vec<double> abs(Vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
MK_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {
      _mm256_or_pd(_mm256_and_pd(_mm256_set1_pd(-0.0), sign.v), _mm256_andnot_pd(_mm256_set1_pd(-0.0), magnitude.v))};
}
MK_INLINE Vec<double> round(Vec<double> a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MK_INLINE Vec<double> power_of_two(Vec<double> n) {
  const __m256i bits = _mm256_castpd_si256(_mm256_add_pd(n.v, _mm256_set1_pd(0x1.8p52)));
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(bits, _mm256_set1_epi64x(1023)), 52))};
}
MK_INLINE Vec<double> exponent_of_normal(Vec<double> a) {
  const __m256i bits = _mm256_srli_epi64(_mm256_slli_epi64(_mm256_castpd_si256(a.v), 1), 53);
  const __m256d biased = _mm256_castsi256_pd(_mm256_or_si256(bits, _mm256_castpd_si256(_mm256_set1_pd(0x1p52))));
  return {_mm256_sub_pd(biased, _mm256_set1_pd(0x1p52 + 1023))};
}
MK_INLINE Vec<double> mantissa_of_normal(Vec<double> a) {
  return {
      _mm256_or_pd(_mm256_and_pd(a.v, _mm256_castsi256_pd(_mm256_set1_epi64x(0xfffffffffffff))), _mm256_set1_pd(1.0))};
}
MK_INLINE MaskD operator<(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
MK_INLINE MaskD operator<=(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
MK_INLINE MaskD operator>(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
MK_INLINE MaskD operator>=(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ)}; }
MK_INLINE MaskD operator==(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
MK_INLINE Vec<double> select(MaskD m, Vec<double> a, Vec<double> b) { return {_mm256_blendv_pd(b.v, a.v, m.m)}; }
MK_INLINE double reduce_add(Vec<double> a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
MK_INLINE double reduce_max(Vec<double> a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}

MK_INLINE Vec<double> reduce_add_each(const double* rows) {
  __m256d p[2];
  for (int t = 0; t < 2; t++) {
    const __m256d a = _mm256_loadu_pd(rows + 4 * t), b = _mm256_loadu_pd(rows + 4 * (t + 2));
    p[t] = _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31));
  }
  return {_mm256_add_pd(_mm256_unpacklo_pd(p[0], p[1]), _mm256_unpackhi_pd(p[0], p[1]))};
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL

#define MK_SCALE_BY_HALVES 1
#include "cpu/generic/vec_math.inl.h"
