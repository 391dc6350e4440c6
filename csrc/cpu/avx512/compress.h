// What searches add to the AVX-512 vocabulary.
#pragma once
#include "cpu/avx512/attention_vec.h"

#define MK_HAVE_COMPRESS 1

namespace mk::cpu::MK_LEVEL {
namespace {

MK_INLINE int64_t lanes_in(Mask16 mask) { return _mm_popcnt_u32(mask.m); }
MK_INLINE int64_t lanes_in(Mask8 mask) { return _mm_popcnt_u32(mask.m); }

// a + b in the lanes of the mask, a in the rest.
MK_INLINE Vec<float> add_in(Mask16 mask, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_add_ps(a.v, mask.m, a.v, b.v)};
}
MK_INLINE Vec<double> add_in(Mask8 mask, Vec<double> a, Vec<double> b) {
  return {_mm512_mask_add_pd(a.v, mask.m, a.v, b.v)};
}

// The lanes of the mask go to `to`, as a whole vector; returns how many there are.
MK_INLINE int64_t compress(Mask16 mask, Vec<float> v, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask.m, v.v));
  return lanes_in(mask);
}
MK_INLINE int64_t compress(Mask8 mask, Vec<double> v, double* to) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(mask.m, v.v));
  return lanes_in(mask);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
