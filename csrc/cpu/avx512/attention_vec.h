// What attention adds to the AVX-512 vocabulary: powers, and transposition of a 16x16 float or 8x8 double block in
// registers.
#pragma once
#include "cpu/avx512/vec.h"

#define MK_HAVE_TRANSPOSE 1
#define MK_HAVE_POWER 1

namespace mk::cpu::MK_LEVEL {
namespace {

// 2^x for x <= 0, relative error 1e-8 before rounding: reduce leaves the fraction above floor(x), scalef multiplies by
// 2^floor(x); -inf gives 0.
MK_INLINE Vec<float> power(Vec<float> x) {
  constexpr float c[7] = {
      2.17022531e-4f, 1.24396885e-3f, 9.67884092e-3f, 5.54833420e-2f, 2.40229836e-1f, 6.93146984e-1f, 1.0f};
  return {_mm512_scalef_ps(polynomial(Vec<float>{_mm512_reduce_ps(x.v, 0x01)}, c).v, x.v)};
}

MK_INLINE void transpose(Vec<float> (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // u[4 i + j]: column 4 l + j of rows 4 i to 4 i + 3 in lane l
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, b, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(c, d, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

MK_INLINE void transpose(Vec<double> (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; j++) {
    const __m512d a = _mm512_shuffle_f64x2(t[j], t[2 + j], 0x88), b = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0x88);
    const __m512d c = _mm512_shuffle_f64x2(t[j], t[2 + j], 0xdd), d = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0xdd);
    r[j].v = _mm512_shuffle_f64x2(a, b, 0x88);
    r[2 + j].v = _mm512_shuffle_f64x2(c, d, 0x88);
    r[4 + j].v = _mm512_shuffle_f64x2(a, b, 0xdd);
    r[6 + j].v = _mm512_shuffle_f64x2(c, d, 0xdd);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
