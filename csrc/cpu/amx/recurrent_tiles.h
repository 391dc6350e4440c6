// Products of the recurrent family on AMX tiles, and how their operands are packed.
//
// Operands are tiles of 16 rows x 32 k (left) and 16 pairs of k x 16 columns (right), 1 KB each, packed one after the
// other; sums are float32 tiles. `beside` runs after every block of k: the matrix unit works beside the vector ports,
// but the reorder buffer is too short to overlap a whole product with what follows it.
#pragma once
#include "cpu/amx/vec.h"

#include "cpu/avx512/transpose.h"
#include "cpu/recurrent.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kBlock = 16, kDepth = 32, kRows = 32, kTile = kBlock * kDepth;  // kTile: elements of an operand tile
using B16 = bfloat16;

MK_INLINE Span rows_of(int64_t rows, int64_t i) { return {i * kRows, smaller(i * kRows + kRows, rows)}; }
MK_INLINE int64_t depth_of(int64_t k) { return (k + kDepth - 1) / kDepth; }

struct Nothing {
  MK_INLINE void operator()() const {}
};

// Brings `rows` runs of `lines` cache lines, `stride` bytes apart, in during `calls` calls.
class Prefetch {
 public:
  Prefetch(const void* at, int64_t stride, int64_t lines, int64_t rows, int64_t calls)
      : at_(static_cast<const char*>(at)), skip_(stride - 64 * lines), lines_(lines), left_(rows * lines) {
    each_ = calls > 0 ? (left_ + calls - 1) / calls : 0;
  }
  MK_INLINE void operator()() {
    for (int64_t i = 0; i < each_ && left_ > 0; i++, left_--, at_ += 64) {
      __builtin_prefetch(at_);
      if (++line_ == lines_) line_ = 0, at_ += skip_;
    }
  }

 private:
  const char* at_;
  int64_t skip_, lines_, left_, each_, line_ = 0;
};

// Left rows that other cores have just written: asked for all at once, in the order of their use, they cost one latency
// and not one a block.
MK_INLINE void fetch_rows(const B16* at, int64_t stride, int64_t width, Span rows) {
  for (int64_t j = 0; j < width; j += kDepth)
    for (int64_t r = rows.begin; r < rows.end; r++) __builtin_prefetch(at + r * stride + j);
}

// Two rows of right operand, 16 columns: the pairs of a tile row.
MK_INLINE __m512i pair_rows(const B16* even, const B16* odd, int64_t left) {
  const __mmask16 mask = Vec<float>::first(left);
  const __m256i low = even ? _mm256_maskz_loadu_epi16(mask, even) : _mm256_setzero_si256();
  const __m256i high = odd ? _mm256_maskz_loadu_epi16(mask, odd) : _mm256_setzero_si256();
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// A panel of 32 columns from rows of k: [k block][half][pair of k][column][2]; row(k) is a row's first element or null
// for zeros.
template <class Row>
MK_INLINE void pack_column_tiles(const Row& row, int64_t count, int64_t first, int64_t width, B16* out) {
  for (int64_t pair = 0; pair < depth_of(count) * kBlock; pair++) {
    const B16 *even = 2 * pair < count ? row(2 * pair) : nullptr,
              *odd = 2 * pair + 1 < count ? row(2 * pair + 1) : nullptr;
    for (int64_t half = 0; half < 2; half++) {
      const int64_t j = first + half * kBlock, left = width - j < 0 ? 0 : smaller(width - j, kBlock),
                    at = smaller(j, width);
      B16* to = out + (pair / kBlock * 2 + half) * kTile + pair % kBlock * kDepth;
      _mm512_storeu_si512(to, pair_rows(even ? even + at : nullptr, odd ? odd + at : nullptr, left));
    }
  }
}

MK_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The sum tiles of 16 rows x 64 columns. Stride 0: the same row 16 times.
MK_INLINE void load_row(const float* c, int64_t stride) {
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(1, c + 16, stride * 4);
  _tile_loadd(2, c + 32, stride * 4);
  _tile_loadd(3, c + 48, stride * 4);
}
MK_INLINE void store_row(float* c, int64_t stride) {
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + 16, stride * 4);
  _tile_stored(2, c + 32, stride * 4);
  _tile_stored(3, c + 48, stride * 4);
}
// Those of 32 rows x 32 columns.
MK_INLINE void load_square(const float* c, int64_t stride) {
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(1, c + 16, stride * 4);
  _tile_loadd(2, c + 16 * stride, stride * 4);
  _tile_loadd(3, c + 16 * stride + 16, stride * 4);
}
MK_INLINE void store_square(float* c, int64_t stride) {
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + 16, stride * 4);
  _tile_stored(2, c + 16 * stride, stride * 4);
  _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

// Those of 32 rows x 48 columns: 0 2 4 above 1 3 5.
MK_INLINE void load_three(const float* c, int64_t stride, bool below) {
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(2, c + 16, stride * 4);
  _tile_loadd(4, c + 32, stride * 4);
  if (!below) return;
  _tile_loadd(1, c + 16 * stride, stride * 4);
  _tile_loadd(3, c + 16 * stride + 16, stride * 4);
  _tile_loadd(5, c + 16 * stride + 32, stride * 4);
}
MK_INLINE void store_three(float* c, int64_t stride, bool below) {
  _tile_stored(0, c, stride * 4);
  _tile_stored(2, c + 16, stride * 4);
  _tile_stored(4, c + 32, stride * 4);
  if (!below) return;
  _tile_stored(1, c + 16 * stride, stride * 4);
  _tile_stored(3, c + 16 * stride + 16, stride * 4);
  _tile_stored(5, c + 16 * stride + 32, stride * 4);
}

// Right tiles are loaded with the hint that they pass through: the left ones stay in the first cache, which gave a
// quarter of the time of products whose weights come from the second.

// Adds 16 rows x 4 tiles over `depth` blocks; the right tiles of a block are b, b + kTile and the same two `pair`
// elements on.
template <class Beside = Nothing>
MK_INLINE void add_row(int64_t depth, const B16* a, int64_t lda, const B16* b, int64_t block, int64_t pair,
                       Beside&& beside = {}) {
  for (int64_t k = 0; k < depth; k++, a += kDepth, b += block) {
    _tile_loadd(4, a, lda * 2);
    _tile_stream_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_stream_loadd(6, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_stream_loadd(7, b + pair, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_stream_loadd(5, b + pair + kTile, 64);
    _tile_dpbf16ps(3, 4, 5);
    beside();
  }
}

// Adds 32 rows x 2 tiles. The left operand is either rows (`lda`) or, with lda = kDepth, packed tiles; `below`: to rows
// 16..31.
template <class Beside = Nothing>
MK_INLINE void add_square(int64_t depth, const B16* a, int64_t lda, int64_t a_step, int64_t below, const B16* b,
                          int64_t block, Beside&& beside = {}) {
  for (int64_t k = 0; k < depth; k++, a += a_step, b += block) {
    _tile_loadd(4, a, lda * 2);
    _tile_stream_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + below, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  }
}

// Adds 16 or (`below` elements further on in the left operand) 32 rows x 3 tiles.
template <class Beside = Nothing>
MK_INLINE void add_three(int64_t depth, const B16* a, int64_t lda, int64_t below, const B16* b, Beside&& beside = {}) {
  if (!below) {
    for (int64_t k = 0; k < depth; k++, a += kDepth, b += 3 * kTile) {
      _tile_loadd(6, a, lda * 2);
      _tile_stream_loadd(7, b, 64);
      _tile_dpbf16ps(0, 6, 7);
      _tile_stream_loadd(1, b + kTile, 64);
      _tile_dpbf16ps(2, 6, 1);
      _tile_stream_loadd(3, b + 2 * kTile, 64);
      _tile_dpbf16ps(4, 6, 3);
      beside();
    }
    return;
  }
  for (int64_t k = 0; k < depth; k++, a += kDepth, b += 3 * kTile) {
    _tile_loadd(6, a, lda * 2);
    _tile_stream_loadd(7, b, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, a + below, lda * 2);
    _tile_dpbf16ps(1, 6, 7);
    _tile_stream_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(3, 6, 7);
    beside();
    _tile_loadd(6, a, lda * 2);
    _tile_dpbf16ps(2, 6, 7);
    _tile_stream_loadd(7, b + 2 * kTile, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(6, a + below, lda * 2);
    _tile_dpbf16ps(5, 6, 7);
    beside();
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
