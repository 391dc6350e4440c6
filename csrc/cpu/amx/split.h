// Float32 products on AMX tiles: every operand is split into three bfloat16 numbers, and six products of the parts are
// added up, the small ones first.
//
//   x = high + middle + low, each the rounding of what the ones before left: exact for 24 bits
//   x y = low high + middle high + middle middle + high middle + high low + high high, within 2^-24 of |x y|
//
// Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations". A sum of products is as accurate as one of float32 fma: 32 terms are summed from zero before they are
// added on. Two limits: what is below 2^-126 counts as zero, and numbers that are infinite or round to infinity in
// bfloat16 make the result NaN, which callers compute again (`broken`).
#pragma once
#include "cpu/amx/recurrent_tiles.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kParts = 3, kSplitTile = kParts * kTile;  // elements of an operand tile of all parts
enum Part : int64_t { kHigh = 0, kMiddle = 1, kLow = 2 };

struct Parts {
  __m256i part[kParts];
};
MK_INLINE Parts split(__m512 x) {
  Parts out;
  for (__m256i& part : out.part) {
    part = pack_bfloat16(x);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
  }
  return out;
}
// `left` of 16 numbers, zeros after them; none from null.
MK_INLINE Parts split(const float* from, int64_t left) {
  if (!from || left <= 0) return {{_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}};
  return split(Vec<float>::load(from, smaller(left, 16)).v);
}

// A row as left operand: [k block][part][32].
MK_INLINE void split_row(const float* from, int64_t width, int64_t depth, B16* out) {
  for (int64_t k = 0; k < depth * kDepth; k += kDepth, out += kParts * kDepth)
    for (int64_t half = 0; half < 2; half++) {
      const Parts parts = split(from ? from + smaller(k + half * 16, width) : nullptr, width - k - half * 16);
      for (int64_t i = 0; i < kParts; i++) _mm256_storeu_si256((__m256i*)(out + i * kDepth + half * 16), parts.part[i]);
    }
}

// Tiles of a right operand, [k block][part][tile], whose 16 columns are rows that lie along k.
MK_INLINE void split_rows(const float* from, int64_t stride, int64_t rows, int64_t count, B16* out) {
  for (int64_t k = 0; k < count; k += kDepth, out += kSplitTile) {
    __m512i words[kParts][16];
    for (int64_t l = 0; l < 16; l++) {
      const float* row = l < rows ? from + l * stride : nullptr;
      const Parts a = split(row ? row + k : nullptr, count - k);
      const Parts b = split(row ? row + smaller(k + 16, count) : nullptr, count - k - 16);
      for (int64_t i = 0; i < kParts; i++)
        words[i][l] = _mm512_inserti64x4(_mm512_castsi256_si512(a.part[i]), b.part[i], 1);
    }
    for (int64_t i = 0; i < kParts; i++) {
      transpose_words(words[i]);
      for (int64_t l = 0; l < 16; l++) _mm512_storeu_si512(out + i * kTile + l * kDepth, words[i][l]);
    }
  }
}

MK_INLINE __m512i pairs(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Tiles of a matrix whose columns lie along k, [k block][part][tile]: 16 columns from `first` on become those of a
// right operand or the rows of a left one. row(k): a row's first element or null for zeros.
template <bool kRight, class Row>
MK_INLINE void split_columns(const Row& row, int64_t count, int64_t first, int64_t width, B16* out) {
  const int64_t left = width - first, at = smaller(first, width);
  for (int64_t k = 0; k < count; k += kDepth, out += kSplitTile) {
    __m512i words[kParts][16];
    for (int64_t pair = 0; pair < 16; pair++) {
      const int64_t n = k + 2 * pair;
      const float *even = n < count ? row(n) : nullptr, *odd = n + 1 < count ? row(n + 1) : nullptr;
      const Parts a = split(even ? even + at : nullptr, left), b = split(odd ? odd + at : nullptr, left);
      for (int64_t i = 0; i < kParts; i++) words[i][pair] = pairs(a.part[i], b.part[i]);
    }
    for (int64_t i = 0; i < kParts; i++) {
      if (!kRight) transpose_words(words[i]);
      for (int64_t l = 0; l < 16; l++) _mm512_storeu_si512(out + i * kTile + l * kDepth, words[i][l]);
    }
  }
}

// A left operand of 32 rows: rows (`split_row`) or two blocks of tiles.
struct SplitLeft {
  const B16* at;
  int64_t row, part, step, below;  // elements from a row, part, k block, block of 16 rows to the next
};
MK_INLINE SplitLeft left_rows(const B16* at, int64_t depth) {
  const int64_t row = depth * kParts * kDepth;
  return {at, row, kDepth, kParts * kDepth, 16 * row};
}
MK_INLINE SplitLeft left_tiles(const B16* at, int64_t depth) {
  return {at, kDepth, kTile, kSplitTile, depth * kSplitTile};
}

// c[32][32] = the product of 32 rows and two columns of tiles. What the large parts leave is added up first, while the
// sums are small: of the roundings of sums, one in six is left.
MK_INLINE void split_product(int64_t depth, SplitLeft a, const B16* b0, const B16* b1, float* c) {
  const auto load_left = [&](int64_t k, Part part) {
    const B16* at = a.at + k * a.step + part * a.part;
    _tile_loadd(4, at, a.row * 2);
    _tile_loadd(5, at + a.below, a.row * 2);
  };
  const auto load_right = [&](int64_t k, Part part) {
    _tile_loadd(6, b0 + k * kSplitTile + part * kTile, 64);
    _tile_loadd(7, b1 + k * kSplitTile + part * kTile, 64);
  };
  const auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  zero_sums();
  // Every pair of parts differs from the one before in one operand.
  for (int64_t k = 0; k < depth; k++) {
    load_left(k, kLow), load_right(k, kHigh), add();
    load_left(k, kMiddle), add();
    load_right(k, kMiddle), add();
    load_left(k, kHigh), add();
    load_right(k, kLow), add();
  }
  for (int64_t k = 0; k < depth; k++) load_left(k, kHigh), load_right(k, kHigh), add();
  store_square(c, 32);
}

// Whether one of 16 sums is infinite or NaN.
MK_INLINE bool broken(Vec<float> sums) { return _mm512_fpclass_ps_mask(sums.v, 0x99) != 0; }

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
