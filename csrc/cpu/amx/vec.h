// The avx512 vocabulary plus AMX tiles: C += A B with bfloat16 operands and float32 sums.
//
// Tile registers: 0-3 hold a 32x32 float32 block of C (0 1 / 2 3), 4-5 two 16x32 bfloat16 blocks of A, 6-7 two 32x16
// blocks of B. A is row-major, 64 bytes a tile row. B is in VNNI order: for each pair of k, the pairs (B[k][n],
// B[k+1][n]) of 16 columns lie in 64 bytes.
#pragma once
#include "cpu/amx/tiles.h"
#include "cpu/avx512/vec.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Of one thread: loads the tile shapes on construction and frees the tile registers at the end (needed for sleep
// states).
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

MK_INLINE __m256i pack_bfloat16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }  // denormals become 0

// rows x 32k panel of A: out[row][k padded to k32], zeros in the padding. k32 = k rounded up to 32, rows32 = rows
// to 32.
template <class S>
MK_INLINE void pack_a(const S* a, int64_t stride, int64_t rows, int64_t k, uint16_t* out, int64_t rows32, int64_t k32) {
  for (int64_t row = 0; row < rows32; row++)
    for (int64_t j = 0; j < k32; j += 16) {
      const int64_t left = row < rows ? (k - j < 0 ? 0 : k - j > 16 ? 16 : k - j) : 0;
      const Vec<float> v = left ? Vec<float>::load(a + row * stride + j, left) : Vec<float>::zero();
      _mm256_storeu_si256((__m256i*)(out + row * k32 + j), pack_bfloat16(v.v));
    }
}

// B[k][n] given as n rows of k (`b + column * stride + k`): out in VNNI order, [k32 / 2][columns32][2].
template <class S>
MK_INLINE void pack_b_rows(const S* b, int64_t stride, int64_t columns, int64_t k, uint16_t* out, int64_t columns32,
                           int64_t k32) {
  for (int64_t column = 0; column < columns32; column++)
    for (int64_t j = 0; j < k32; j += 16) {
      const int64_t left = column < columns ? (k - j < 0 ? 0 : k - j > 16 ? 16 : k - j) : 0;
      const Vec<float> v = left ? Vec<float>::load(b + column * stride + j, left) : Vec<float>::zero();
      alignas(32) uint32_t pairs[8];
      _mm256_store_si256((__m256i*)pairs, pack_bfloat16(v.v));
      for (int64_t p = 0; p < 8; p++) std::memcpy(out + ((j / 2 + p) * columns32 + column) * 2, &pairs[p], 4);
    }
}

// B[k][n] given as k rows of n (`b + k * stride + column`): out in VNNI order, [k32 / 2][columns32][2].
template <class S>
MK_INLINE void pack_b_columns(const S* b, int64_t stride, int64_t k, int64_t columns, uint16_t* out, int64_t columns32,
                              int64_t k32) {
  for (int64_t row = 0; row < k32; row += 2)
    for (int64_t j = 0; j < columns32; j += 16) {
      const int64_t left = columns - j < 0 ? 0 : columns - j > 16 ? 16 : columns - j;
      __m256i even = _mm256_setzero_si256(), odd = even;
      if (row < k && left) even = pack_bfloat16(Vec<float>::load(b + row * stride + j, left).v);
      if (row + 1 < k && left) odd = pack_bfloat16(Vec<float>::load(b + (row + 1) * stride + j, left).v);
      const __m512i wide =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(out + (row / 2 * columns32 + j) * 2, wide);
    }
}

// C[32][32] (+)= A[32][k32] B[k32][32]; a_stride in elements of A, b_stride = columns32 of the VNNI panel, c_stride in
// floats.
MK_INLINE void tile_gemm_32x32(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t k32,
                               float* c, int64_t c_stride, bool add) {
  const int64_t a_bytes = a_stride * 2, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * c_stride, c_bytes);
    _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < k32; k += 32) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
    _tile_loadd(6, b + k * b_stride, b_bytes);
    _tile_loadd(7, b + k * b_stride + 32, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * c_stride, c_bytes);
  _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
