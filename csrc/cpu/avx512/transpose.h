// Transposition in registers, for packing; needs AVX-512.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

// 16 x 16 words, transposed.
MK_INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]),
          s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]),
          r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]),
              r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), s[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    s[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88),
          s[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(s[i], s[8 + i], 0x88), r[8 + i] = _mm512_shuffle_i32x4(s[i], s[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0x88),
          r[12 + i] = _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0xdd);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
