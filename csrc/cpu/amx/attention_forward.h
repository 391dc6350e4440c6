// Attention forward of bfloat16 on AMX tiles: scores and sums are float32, weights are rounded to bfloat16 before they
// meet the values.
#pragma once
#include "cpu/amx/vec.h"
#include "cpu/avx512/attention_vec.h"
#define MK_ATTENTION_OVERRIDDEN 1
#include "cpu/generic/attention.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Up to this many queries the tiles would stand almost empty, and packing costs more than the products.
constexpr int64_t kFewHalves = 4;

MK_INLINE int64_t padded32(int64_t n) { return (n + 31) / 32 * 32; }

// 2^x, relative error 1e-7: enough for weights that become bfloat16.
MK_INLINE __m512 fast_power_of_fraction(__m512 fraction) {
  constexpr float c[6] = {1.87757677e-3f, 8.98933988e-3f, 5.58263182e-2f, 2.40153617e-1f, 6.93153073e-1f, 0.999999925f};
  return polynomial(Vec<float>{fraction}, c).v;
}
MK_INLINE __m512 fast_power(__m512 x) { return _mm512_scalef_ps(fast_power_of_fraction(_mm512_reduce_ps(x, 0x01)), x); }
MK_INLINE __m512i two_bfloat16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

MK_INLINE __m512i load_halves(const bfloat16* p, int64_t n) {  // n of 32, zeros after
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : _bzhi_u32(~0u, unsigned(n < 0 ? 0 : n)), p);
}
MK_INLINE bool not_finite(__m512i halves) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, exponent), exponent) != 0;
}

// Operand A: rows of columns32, zero padded. Returns whether something was not finite.
MK_INLINE bool pack_plain_halves(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns, uint16_t* out,
                                 int64_t rows32) {
  const int64_t columns32 = padded32(columns);
  bool broken = false;
  for (int64_t row = 0; row < rows32; row++)
    for (int64_t j = 0; j < columns32; j += 32) {
      const __m512i x = row < rows ? load_halves(in + row * stride + j, columns - j) : _mm512_setzero_si512();
      broken |= not_finite(x);
      _mm512_storeu_si512(out + row * columns32 + j, x);
    }
  return broken;
}

// Operand B whose columns are the rows of `in`: [columns32 / 2][rows32][2], a transposition of 32-bit pairs.
MK_INLINE void pack_pairs_across(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns, uint16_t* out,
                                 int64_t rows32) {
  for (int64_t j = 0; j < padded32(columns); j += 32)
    for (int64_t row = 0; row < rows32; row += 16) {
      Vec<float> block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        block[i].v = _mm512_castsi512_ps(row + i < rows ? load_halves(in + (row + i) * stride + j, columns - j)
                                                        : _mm512_setzero_si512());
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_ps(out + ((j / 2 + i) * rows32 + row) * 2, block[i].v);
    }
}

MK_INLINE __m512i interleave_order() {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  return _mm512_load_si512(order);
}

// Operand B whose rows are those of `in`: [rows32 / 2][columns32][2]. Returns whether something was not finite.
MK_INLINE bool pack_pairs_down(const bfloat16* in, int64_t stride, int64_t rows, int64_t columns, uint16_t* out,
                               int64_t rows32) {
  const int64_t columns32 = padded32(columns);
  const __m512i order = interleave_order();
  bool broken = false;
  for (int64_t row = 0; row < rows32; row += 2)
    for (int64_t j = 0; j < columns32; j += 32) {
      const __m512i even = row < rows ? load_halves(in + row * stride + j, columns - j) : _mm512_setzero_si512();
      const __m512i odd =
          row + 1 < rows ? load_halves(in + (row + 1) * stride + j, columns - j) : _mm512_setzero_si512();
      broken |= not_finite(even) || not_finite(odd);
      const __m512i low = _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1),
                    high = _mm512_shuffle_i64x2(even, odd, 0xee);
      uint16_t* to = out + (row / 2 * columns32 + j) * 2;
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, low));
      _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(order, high));
    }
  return broken;
}

constexpr int64_t kHalfRows = 32, kHalfGroup = 1024, kHalfKeys = 256;
constexpr float kHeadroom = 24;  // in powers of 2

struct HalfForward {
  static constexpr int64_t kScoreRow = kHalfKeys + 16, kWeightRow = kHalfKeys + 32;
  uint16_t *query, *key, *value, *weights;
  float *sums, *base, *total, *scores, *bias, *kept, *shrink;
  int64_t width, value_width, used;

  HalfForward(const AttentionArgs& a, void* memory) : width(padded32(a.width)), value_width(padded32(a.value_width)) {
    Carver carver(memory);
    const int64_t rows = padded32(smaller(kHalfGroup, a.queries));
    query = carver.take<uint16_t>(rows * width);
    key = carver.take<uint16_t>(kHalfKeys * width);
    value = carver.take<uint16_t>(kHalfKeys * value_width);
    weights = carver.take<uint16_t>(kHalfRows * kWeightRow);
    sums = carver.take<float>(rows * value_width);
    base = carver.take<float>(rows);
    total = carver.take<float>(rows);
    scores = carver.take<float>(kHalfRows * kScoreRow);
    bias = carver.take<float>(kHalfKeys);
    kept = carver.take<float>(kHalfKeys);
    shrink = carver.take<float>(kHalfRows);
    used = carver.used();
  }
};

// Weights of one row relative to `zero_point`, their sum, and whether a score lies so far above it that the sum could
// overflow.
MK_INLINE bool half_weights(const float* s, uint16_t* weights, Range block, float zero_point, const float* kept,
                            float& sum) {
  const __m512 zero = _mm512_set1_ps(zero_point), unit = _mm512_set1_ps(kUnit<float>);
  const auto above = [&](const float* scores) {
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores), zero), unit);
  };
  __m512 first = _mm512_setzero_ps(), second = first, most = first;
  for (int64_t k = block.first; k < block.last; k += 32) {
    const __m512 x = above(s + k), y = above(s + k + 16);
    most = _mm512_max_ps(most, _mm512_max_ps(x, y));
    __m512 a = fast_power(x), b = fast_power(y);
    first = _mm512_add_ps(first, a), second = _mm512_add_ps(second, b);
    if (kept) a = _mm512_mul_ps(a, _mm512_loadu_ps(kept + k)), b = _mm512_mul_ps(b, _mm512_loadu_ps(kept + k + 16));
    _mm512_storeu_si512(weights + k, two_bfloat16(a, b));
  }
  sum = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
  return _mm512_cmp_ps_mask(most, _mm512_set1_ps(kHeadroom), _CMP_GT_OQ) != 0;
}

MK_INLINE float highest(const float* s, Range block) {
  __m512 most = _mm512_set1_ps(-kInfinity<float>), other = most;
  for (int64_t k = block.first; k < block.last; k += 32) {
    most = _mm512_max_ps(most, _mm512_loadu_ps(s + k));
    other = _mm512_max_ps(other, _mm512_loadu_ps(s + k + 16));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(most, other));
}

// softmax_row with the weights rounded to bfloat16; `block` is a whole number of 32 keys. The base moves only if a
// score exceeds it by 2^kHeadroom, so most blocks need neither their maximum first nor a rescaling of the sums.
MK_INLINE float half_softmax_row(const float* s, uint16_t* weights, Range block, float& base, float& total,
                                 const float* kept) {
  float sum;
  if (base != -kInfinity<float> && !half_weights(s, weights, block, base, kept, sum)) {
    total += sum;
    return 1;
  }
  const float found = highest(s, block), old = base;
  base = found > old ? found : old;
  const float zero_point = base == -kInfinity<float> ? 0 : base;
  half_weights(s, weights, block, zero_point, kept, sum);
  const float shrink = _mm512_cvtss_f32(fast_power(_mm512_set1_ps((old - zero_point) * kUnit<float>)));
  total = total * shrink + sum;
  return shrink;
}

MK_INLINE void half_softmax(const AttentionArgs& a, const HalfForward& w, int64_t b, int64_t h, int64_t query,
                            int64_t rows, int64_t first, Range block, float* base, float* total) {
  const Range whole = {block.first / 32 * 32, padded32(block.last)};
  if (!a.mask)
    for (int64_t k = 0; k < kHalfKeys; k++) w.bias[k] = 0;
  for (int64_t i = 0; i < rows; i++) {
    const Range all = seen_by(a, query + i);
    Range seen = {larger(all.first - first, block.first), smaller(all.last - first, block.last)};
    if (seen.first >= seen.last) seen = {whole.last, whole.last};
    float* s = w.scores + i * w.kScoreRow;
    if (a.softcap > 0) cap_scores<float>(a, s, whole.first, whole.last, nullptr);
    if (a.mask) load_mask<float, bfloat16>(a, b, h, query + i, first, block.first, block.last, w.bias);
    mask_scores(s, whole, seen, w.bias, factor_after_cap<float>(a));
    if (a.seed) load_kept<float>(a, b, h, query + i, first, whole.first, whole.last, w.kept);
    w.shrink[i] =
        half_softmax_row(s, w.weights + i * w.kWeightRow, whole, base[i], total[i], a.seed ? w.kept : nullptr);
  }
}

MK_INLINE void half_rows(const AttentionArgs& a, const HalfForward& w, int64_t b, int64_t h, int64_t query, int64_t row,
                         int64_t rows, int64_t first, int64_t keys, Range block) {
  const Range whole = {block.first / 32 * 32, padded32(block.last)};
  const int64_t keys32 = padded32(keys);
  for (int64_t k = whole.first; k < whole.last; k += 32)
    tile_gemm_32x32(w.query + row * w.width, w.width, w.key + k * 2, keys32, w.width, w.scores + k, w.kScoreRow, false);
  half_softmax(a, w, b, h, query, rows, first, block, w.base + row, w.total + row);
  float* sums = w.sums + row * w.value_width;
  for (int64_t i = 0; i < rows; i++) {
    if (w.shrink[i] == 1) continue;
    const __m512 shrink = _mm512_set1_ps(w.shrink[i]);
    for (int64_t j = 0; j < w.value_width; j += 16)
      _mm512_storeu_ps(sums + i * w.value_width + j,
                       _mm512_mul_ps(shrink, _mm512_loadu_ps(sums + i * w.value_width + j)));
  }
  for (int64_t j = 0; j < w.value_width; j += 32)
    tile_gemm_32x32(w.weights + whole.first, w.kWeightRow, w.value + (whole.first / 2 * w.value_width + j) * 2,
                    w.value_width, whole.last - whole.first, sums + j, w.value_width, true);
}

// False where a value is not finite: the tiles cannot leave it out for the queries that do not see it.
bool half_blocks(const AttentionArgs& a, const HalfForward& w, int64_t b, int64_t h, int64_t begin, int64_t end,
                 int64_t start, int64_t stop) {
  const int64_t shared = h / (a.heads / a.key_heads), rows = end - begin;
  const Tiles tiles;
  pack_plain_halves(rows_of<bfloat16>(a.query, b, h, begin), a.query.row, rows, a.width, w.query, padded32(rows));
  for (int64_t i = 0; i < padded32(rows) * w.value_width; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < rows; i++) w.base[i] = -kInfinity<float>, w.total[i] = 0;
  for (int64_t i = 0; i < kHalfRows * w.kWeightRow; i++) w.weights[i] = 0;
  const Range seen = seen_by_block(a, begin, end, start, stop);
  for (int64_t first = start + seen.first / kHalfKeys * kHalfKeys; first < start + seen.last; first += kHalfKeys) {
    const int64_t keys = smaller(kHalfKeys, stop - first), keys32 = padded32(keys);
    pack_pairs_across(rows_of<bfloat16>(a.key, b, shared, first), a.key.row, keys, a.width, w.key, keys32);
    if (pack_pairs_down(rows_of<bfloat16>(a.value, b, shared, first), a.value.row, keys, a.value_width, w.value,
                        keys32))
      return false;
    for (int64_t row = 0; row < rows; row += kHalfRows) {
      const int64_t count = smaller(kHalfRows, rows - row);
      const Range block = seen_by_block(a, begin + row, begin + row + count, first, first + keys);
      if (block.first < block.last) half_rows(a, w, b, h, begin + row, row, count, first, keys, block);
    }
  }
  return true;
}

// The generic code on rows of a task of the tiles, which may be more than it takes at a time.
MK_INLINE void forward_by_blocks(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end,
                                 int64_t split, void* memory) {
  for (int64_t at = begin; at < end; at += kQueryGroup)
    forward<float, bfloat16>(a, b, h, at, smaller(at + kQueryGroup, end), split, memory);
}

// One row's result, or its part of it.
MK_INLINE void half_result(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, int64_t split,
                           const float* sums, float base, float total) {
  if (a.splits == 1) return write_row<float, bfloat16>(a, row_index(a, b, h, query), sums, base, total);
  const Partial<float> out(a, b, h, split);
  const int64_t row = padded<float>(a.value_width);
  for (int64_t j = 0; j < row; j++) out.sums[query * row + j] = sums[j];
  out.base[query] = base, out.total[query] = total;
}

void half_forward_biased(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                         void* memory) {
  const HalfForward w(a, memory);
  const int64_t start = split * a.split_keys, stop = smaller(start + a.split_keys, a.seen_keys), rows = end - begin;
  if (!half_blocks(a, w, b, h, begin, end, start, stop)) return forward_by_blocks(a, b, h, begin, end, split, memory);
  for (int64_t i = 0; i < rows; i++)
    half_result(a, b, h, begin + i, split, w.sums + i * w.value_width, w.base[i], w.total[i]);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
