// Attention backward of bfloat16 on AMX tiles. Scores are computed transposed, [keys][queries]: then weights and ds are
// operands of dvalue += p^T dout and dkey += ds^T query as they are, and of dquery^T += key^T ds^T after an
// interleaving of pairs of rows. Queries and upstream gradients are packed once a part (O(Q) scratch), keys once a
// block; sums are float32, p and ds bfloat16.
//
// Loads and stores of sums cost the tiles more than their products: a product of depth 256 takes 0.75 of the time of
// two of depth 128. Operands and sums whose columns are queries lie in panels of 32, so that a tile's rows are
// neighbours and not the same few cache sets.
#pragma once
#include "cpu/amx/attention_forward.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kHalfQueries = 256, kPanelQueries = 32;
constexpr int64_t kTaskQueries = 128;  // least of a task that computes dquery alone, which gains nothing from depth

struct HalfBackward {
  // query_across, dout_across: operand B of the scores, [head][panel][width / 2][32][2]; query_down, dout_down: operand
  // B of dkey and dvalue, [slice of 64 columns][head][queries / 2][columns][2]; pairs: operand B of dquery^T,
  // [panel][keys / 2][32][2]; dquery: [head][panel][width][32].
  static constexpr int64_t kWeightRow = kHalfQueries + 32, kSlice = 64;
  uint16_t *query_across, *dout_across, *query_down, *dout_down, *key, *value, *key_columns, *weights, *gradients,
      *pairs;
  float *base, *delta, *dquery, *dkey, *dvalue, *scores, *products;
  int64_t width, value_width, queries, rows, used;

  HalfBackward(const AttentionArgs& a, void* memory)
      : width(padded32(a.width)), value_width(padded32(a.value_width)), queries(padded32(a.queries)) {
    Carver carver(memory);
    rows = queries * (a.key_heads ? a.heads / a.key_heads : 1);
    query_across = carver.take<uint16_t>(rows * width);
    dout_across = carver.take<uint16_t>(rows * value_width);
    query_down = carver.take<uint16_t>(rows * width);
    dout_down = carver.take<uint16_t>(rows * value_width);
    base = carver.take<float>(rows);
    delta = carver.take<float>(rows);
    dquery = carver.take<float>(rows * width);
    key = carver.take<uint16_t>(kBackwardKeys * width);
    value = carver.take<uint16_t>(kBackwardKeys * value_width);
    key_columns = carver.take<uint16_t>(kBackwardKeys * width);
    dkey = carver.take<float>(kBackwardKeys * width);
    dvalue = carver.take<float>(kBackwardKeys * value_width);
    weights = carver.take<uint16_t>(kBackwardKeys * kWeightRow);
    gradients = carver.take<uint16_t>(kBackwardKeys * kWeightRow);
    pairs = carver.take<uint16_t>(kBackwardKeys * kHalfQueries);
    scores = carver.take<float>(32 * 32);
    products = carver.take<float>(32 * 32);
    used = carver.used();
  }
  // Columns of the slice from `column`, and its row `slot`.
  static int64_t slice(int64_t width, int64_t column) { return smaller(kSlice, width - column); }
  int64_t slice_at(int64_t width, int64_t column, int64_t slot) const {
    return rows * column + slot * slice(width, column);
  }
};

// What the tiles do not cover: a mask, dropout, few keys, and windows of one key, where differences of equal numbers
// must be exactly 0.
MK_INLINE bool tiles_cover(const AttentionArgs& a) {
  const bool one_key = a.left >= 0 && a.right >= 0 && a.left + a.right < 1;
  return a.width && !a.mask && !a.seed && a.dout.data && a.seen_keys > kBackwardKeys && a.queries > kFewHalves &&
         (a.scale > 0 || a.softcap > 0) && !one_key;
}

// Row sums of dout . value weights, in float32, for a query whose keys are few: the rounded `out` would not do.
float exact_delta(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, Range seen) {
  const int64_t shared = h / (a.heads / a.key_heads);
  const bfloat16 *q = rows_of<bfloat16>(a.query, b, h, query), *d = rows_of<bfloat16>(a.dout, b, h, query);
  const auto dot = [](const bfloat16* x, const bfloat16* y, int64_t n) {
    Vec<float> sum = Vec<float>::zero();
    for_each_vec<Vec<float>>(
        n, [&](int64_t j, auto part) { sum = fma(load<Vec<float>>(x + j, part), load<Vec<float>>(y + j, part), sum); });
    return reduce_add(sum);
  };
  const float base = static_cast<const float*>(a.rows_base)[row_index(a, b, h, query)];
  float total = float(__builtin_exp(double(sink_of<float, bfloat16>(a, h)) - base)), sum = 0;
  for (int64_t k = seen.first; k < seen.last; k++) {
    Vec<float> score = Vec<float>::set1(dot(q, rows_of<bfloat16>(a.key, b, shared, k), a.width)), slope;
    score = a.softcap > 0 ? capped(a, score, slope) : score * Vec<float>::set1(float(a.scale));
    const float weight = _mm512_cvtss_f32(exp(score - Vec<float>::set1(base)).v);
    total += weight, sum += weight * dot(d, rows_of<bfloat16>(a.value, b, shared, k), a.value_width);
  }
  return total > 0 ? sum / total : 0;
}

// Base and unit of a query as one power of 2. Its rounding, 2^-12 at most up to kHalfBeyond, is little beside that of
// bfloat16 weights.
constexpr double kHalfBeyond = 0x1p11;
double half_restate_beyond(const AttentionArgs& a) {
  return a.queries <= kFewHalves ? restate_beyond<float, bfloat16>(a) : double(kHalfBeyond);
}
MK_INLINE float joint_base(const AttentionArgs& a, int64_t row) {
  const double base = static_cast<const float*>(a.rows_base)[row], unit = static_cast<const float*>(a.rows_unit)[row];
  return float(base * 1.4426950408889634074 - __builtin_log2(unit));
}

MK_INLINE void pack_queries(const AttentionArgs& a, const AttentionPart& part, const HalfBackward& w, int64_t h,
                            int64_t slot) {
  for (int64_t at = part.begin; at < part.end; at += kPanelQueries) {
    const int64_t rows = smaller(kPanelQueries, part.end - at), to = slot * w.queries + at - part.begin;
    const bfloat16 *query = rows_of<bfloat16>(a.query, part.b, h, at), *dout = rows_of<bfloat16>(a.dout, part.b, h, at);
    pack_pairs_across(query, a.query.row, rows, a.width, w.query_across + to * w.width, kPanelQueries);
    pack_pairs_across(dout, a.dout.row, rows, a.value_width, w.dout_across + to * w.value_width, kPanelQueries);
    for (int64_t j = 0; j < w.width; j += w.kSlice)
      pack_pairs_down(query + j, a.query.row, rows, smaller(w.kSlice, a.width - j),
                      w.query_down + w.slice_at(w.width, j, to), kPanelQueries);
    for (int64_t j = 0; j < w.value_width; j += w.kSlice)
      pack_pairs_down(dout + j, a.dout.row, rows, smaller(w.kSlice, a.value_width - j),
                      w.dout_down + w.slice_at(w.value_width, j, to), kPanelQueries);
    const int64_t from = row_index(a, part.b, h, at);
    for (int64_t i = 0; i < kPanelQueries; i++) {
      w.base[to + i] = i < rows ? joint_base(a, from + i) : kInfinity<float>;
      w.delta[to + i] = i < rows ? static_cast<const float*>(a.rows_delta)[from + i] : 0;
      const Range seen = i < rows ? seen_by(a, at + i) : Range{0, a.keys};
      if (in_one_block(a, seen)) w.delta[to + i] += exact_delta(a, part.b, h, at + i, seen);
    }
    for (int64_t i = 0; i < kPanelQueries * w.width; i++) w.dquery[to * w.width + i] = 0;
  }
}

// Which of 16 queries from `query` see a key: queries [first, last).
MK_INLINE __mmask16 sees(int64_t first, int64_t last, int64_t query) {
  const auto below = [&](int64_t end) { return _bzhi_u32(0xffff, unsigned(smaller(larger(end - query, 0), 16))); };
  return __mmask16(below(last) & ~below(first));
}

// Weights and ds of 32 keys and 32 queries from w.scores and w.products, written as the three operands; `edge`: not all
// see all.
template <bool edge, bool cap>
MK_INLINE void half_gradients(const AttentionArgs& a, const HalfBackward& w, int64_t key, int64_t keys, int64_t first,
                              int64_t query, int64_t column, int64_t slot) {
  const __m512 factor = _mm512_set1_ps(factor_after_cap<float>(a) * kUnit<float>);
  const __m512 base[2] = {_mm512_loadu_ps(w.base + slot + column), _mm512_loadu_ps(w.base + slot + column + 16)};
  const __m512 delta[2] = {_mm512_loadu_ps(w.delta + slot + column), _mm512_loadu_ps(w.delta + slot + column + 16)};
  const __m512i order = interleave_order();
  for (int64_t row = 0; row < 32; row += 2) {
    __m512 p[2][2], g[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      int64_t from = 0, to = 0;
      if (edge) {  // key sees queries from .. to: the inverse of seen_by
        const int64_t at = first + key + row + i - a.shift;
        from = a.right < 0 ? 0 : at - a.right, to = a.left < 0 ? a.queries : at + a.left + 1;
        if (key + row + i >= keys) to = from;
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const float *s = w.scores + (row + i) * 32 + 16 * j, *d = w.products + (row + i) * 32 + 16 * j;
        Vec<float> score = Vec<float>::load(s), slope = Vec<float>::zero();
        if (cap) score = capped(a, score, slope);
        __m512 weight = fast_power(_mm512_fmsub_ps(score.v, factor, base[j]));
        if (edge) weight = _mm512_maskz_mov_ps(sees(from, to, query + column + 16 * j), weight);
        const __mmask16 some = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        p[i][j] = weight;
        g[i][j] = _mm512_maskz_mul_ps(some, weight, _mm512_sub_ps(_mm512_loadu_ps(d), delta[j]));
        if (cap) g[i][j] = _mm512_maskz_mul_ps(some, g[i][j], slope.v);
      }
      const int64_t at = (key + row + i) * w.kWeightRow + column;
      _mm512_storeu_si512(w.weights + at, two_bfloat16(p[i][0], p[i][1]));
      _mm512_storeu_si512(w.gradients + at, two_bfloat16(g[i][0], g[i][1]));
    }
    uint16_t* pairs = w.pairs + column * kBackwardKeys + (key + row) * kPanelQueries;
    _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(order, two_bfloat16(g[0][0], g[1][0])));
    _mm512_storeu_si512(pairs + 32, _mm512_permutexvar_epi16(order, two_bfloat16(g[0][1], g[1][1])));
  }
}

MK_INLINE void clear_gradients(const HalfBackward& w, int64_t key, int64_t column) {
  for (int64_t row = 0; row < 32; row++) {
    _mm512_storeu_si512(w.weights + (key + row) * w.kWeightRow + column, _mm512_setzero_si512());
    _mm512_storeu_si512(w.gradients + (key + row) * w.kWeightRow + column, _mm512_setzero_si512());
    _mm512_storeu_si512(w.pairs + column * kBackwardKeys + (key + row) * kPanelQueries, _mm512_setzero_si512());
  }
}

// The operands of one block of keys against the panels of `columns`, of queries from `query` to `end`, packed at row
// `slot`.
MK_INLINE void half_operands(const AttentionArgs& a, const HalfBackward& w, int64_t query, int64_t end, Range columns,
                             int64_t slot, int64_t first, int64_t keys) {
  const bool cap = a.softcap > 0;
  for (int64_t column = columns.first; column < columns.last; column += kPanelQueries) {
    const Range top = seen_by(a, query + column), bottom = seen_by(a, smaller(query + column + kPanelQueries, end) - 1);
    for (int64_t key = 0; key < padded32(keys); key += 32) {
      const int64_t low = first + key, high = smaller(low + 32, first + keys);
      if (top.first >= high || bottom.last <= low) {
        clear_gradients(w, key, column);
        continue;
      }
      tile_gemm_32x32(w.key + key * w.width, w.width, w.query_across + (slot + column) * w.width, kPanelQueries,
                      w.width, w.scores, 32, false);
      tile_gemm_32x32(w.value + key * w.value_width, w.value_width, w.dout_across + (slot + column) * w.value_width,
                      kPanelQueries, w.value_width, w.products, 32, false);
      const bool inside = bottom.first <= low && top.last >= low + 32 && key + 32 <= keys;
      const auto gradients = inside ? cap ? half_gradients<false, true> : half_gradients<false, false>
                             : cap ? half_gradients<true, true>
                                    : half_gradients<true, false>;
      gradients(a, w, key, keys, first, query, column, slot);
    }
  }
}

// C[rows][columns] += A[rows][depth] B, all whole 32-blocks; a column block of B and of C is `b_step` and `c_step`
// elements from the next.
MK_INLINE void add_tiles(const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_columns, int64_t b_step,
                         int64_t rows, int64_t blocks, int64_t depth, float* c, int64_t c_row, int64_t c_step) {
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t j = 0; j < blocks; j++)
      tile_gemm_32x32(a + i * a_row, a_row, b + j * b_step, b_columns, depth, c + i * c_row + j * c_step, c_row, true);
}

// dkey or dvalue += weights^T [keys32][depth] by rows [at, at + depth) of `down`. A slice of those stays in the L1
// cache while all weights pass.
MK_INLINE void add_to_keys(const HalfBackward& w, const uint16_t* weights, const uint16_t* down, int64_t width,
                           int64_t at, int64_t depth, int64_t keys32, float* sums) {
  for (int64_t j = 0; j < width; j += w.kSlice)
    add_tiles(weights, w.kWeightRow, down + w.slice_at(width, j, at), w.slice(width, j), 64, keys32,
              w.slice(width, j) / 32, depth, sums + j, width, 32);
}

// What the operands of the panels of `columns` add to the sums.
MK_INLINE void add_products(const AttentionArgs& a, const AttentionPart& part, const HalfBackward& w, Range columns,
                            int64_t slot, int64_t keys32) {
  const int64_t depth = columns.last - columns.first, at = slot + columns.first;
  if (part.dkv && a.dvalue)
    add_to_keys(w, w.weights + columns.first, w.dout_down, w.value_width, at, depth, keys32, w.dvalue);
  if (part.dkv && a.dkey) add_to_keys(w, w.gradients + columns.first, w.query_down, w.width, at, depth, keys32, w.dkey);
  for (int64_t panel = 0; part.dquery && panel < depth; panel += kPanelQueries)
    add_tiles(w.key_columns, kBackwardKeys, w.pairs + (columns.first + panel) * kBackwardKeys, kPanelQueries, 0,
              w.width, 1, keys32, w.dquery + (at + panel) * w.width, kPanelQueries, 0);
}

// dquery^T [width][kPanelQueries] of each panel of queries to rows of dquery_sums.
MK_INLINE void store_dquery(const AttentionArgs& a, const AttentionPart& part, const HalfBackward& w, int64_t h,
                            int64_t slot) {
  const int64_t row = padded<float>(a.width);
  for (int64_t at = part.begin; at < part.end; at += kPanelQueries) {
    const float* from = w.dquery + (slot * w.queries + at - part.begin) * w.width;
    float* to = static_cast<float*>(a.dquery_sums) +
                (part.run * a.batch * a.heads * a.queries + row_index(a, part.b, h, at)) * row;
    const int64_t rows = smaller(kPanelQueries, part.end - at);
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t j = 0; j < row; j += 16) {
        Vec<float> block[16];
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++) block[k] = Vec<float>::load(from + (j + k) * kPanelQueries + i);
        transpose(block);
        for (int k = 0; k < smaller(16, rows - i); k++) block[k].store(to + (i + k) * row + j);
      }
  }
}

// key^T [width][kBackwardKeys], operand A of dquery^T; false where a key is not finite.
MK_INLINE bool pack_keys(const AttentionArgs& a, const AttentionPart& part, const HalfBackward& w, int64_t first,
                         int64_t keys) {
  const int64_t keys32 = padded32(keys);
  const bfloat16* key = rows_of<bfloat16>(a.key, part.b, part.h, first);
  pack_plain_halves(rows_of<bfloat16>(a.value, part.b, part.h, first), a.value.row, keys, a.value_width, w.value,
                    keys32);
  const bool broken = pack_plain_halves(key, a.key.row, keys, a.width, w.key, keys32);
  if (part.dquery)
    for (int64_t i = 0; i < keys32; i++)
      for (int64_t j = 0; j < w.width; j++) w.key_columns[j * kBackwardKeys + i] = w.key[i * w.width + j];
  return !broken;
}

// Columns of the panels of queries [begin, end) from the first to the last that sees one of the keys [first, last).
MK_INLINE Range seeing_panels(const AttentionArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const auto blind = [&](int64_t column) {
    const int64_t at = begin + column;
    const Range block = seen_by_block(a, at, smaller(at + kPanelQueries, end), first, last);
    return block.first >= block.last;
  };
  Range columns = {0, padded32(end - begin)};
  while (columns.first < columns.last && blind(columns.first)) columns.first += kPanelQueries;
  while (columns.first < columns.last && blind(columns.last - kPanelQueries)) columns.last -= kPanelQueries;
  return columns;
}

bool half_parts(const AttentionArgs& a, const AttentionPart& part, const HalfBackward& w) {
  const int64_t group = a.heads / a.key_heads, stop = smaller(part.last, a.seen_keys);
  const Tiles tiles;
  clear_unseen<bfloat16>(a, part);
  for (int64_t g = 0; g < group; g++) pack_queries(a, part, w, part.h * group + g, g);
  for (int64_t first = part.first; first < stop; first += kBackwardKeys) {
    const int64_t keys = smaller(kBackwardKeys, stop - first), keys32 = padded32(keys);
    if (!pack_keys(a, part, w, first, keys)) return false;
    for (int64_t i = 0; i < kBackwardKeys * w.width; i++) w.dkey[i] = 0;
    for (int64_t i = 0; i < kBackwardKeys * w.value_width; i++) w.dvalue[i] = 0;
    for (int64_t g = 0; g < group; g++)
      for (int64_t at = part.begin; at < part.end; at += kHalfQueries) {
        const int64_t slot = g * w.queries + at - part.begin, end = smaller(at + kHalfQueries, part.end);
        const Range columns = seeing_panels(a, at, end, first, first + keys);
        if (columns.first >= columns.last) continue;
        half_operands(a, w, at, end, columns, slot, first, keys);
        add_products(a, part, w, columns, slot, keys32);
      }
    const int64_t row = (part.b * a.key_heads + part.h) * a.keys + first;
    if (part.dkv && a.dkey)
      write_keys(w.dkey, w.width, keys, a.width, float(a.scale), static_cast<bfloat16*>(a.dkey) + row * a.width);
    if (part.dkv && a.dvalue)
      write_keys(w.dvalue, w.value_width, keys, a.value_width, 1.0f,
                 static_cast<bfloat16*>(a.dvalue) + row * a.value_width);
  }
  for (int64_t g = 0; g < group && part.dquery; g++) store_dquery(a, part, w, part.h * group + g, g);
  return true;
}

void half_backward(const AttentionArgs& a, const AttentionPart& part, void* memory) {
  if (!tiles_cover(a) || any_beyond<float>(a, part.b, part.h) || !half_parts(a, part, HalfBackward(a, memory)))
    backward<float, bfloat16>(a, part, memory);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
