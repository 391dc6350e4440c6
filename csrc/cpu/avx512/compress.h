// What searches add to the AVX-512 vocabulary.
#pragma once
#include "cpu/avx512/attention_vec.h"

#define MK_HAVE_COMPRESS 1

namespace mk::cpu::MK_LEVEL {
namespace {

// The lanes of the mask go to `to`, as a whole vector; returns how many there are.
MK_INLINE int64_t compress(Mask16 mask, Vec<float> v, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask.m, v.v));
  return _mm_popcnt_u32(mask.m);
}
MK_INLINE int64_t compress(Mask8 mask, Vec<double> v, double* to) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(mask.m, v.v));
  return _mm_popcnt_u32(mask.m);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
