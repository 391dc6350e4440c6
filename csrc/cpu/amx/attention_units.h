// Attention forward of bfloat16 without mask and dropout, in units of 32 queries and 64 keys. While the vector ports
// turn the scores of one unit into weights, the tiles compute the scores of the next unit and add the values of the
// run before, of one unit or two: the instructions are interleaved here, because the reorder buffer is shorter than a
// unit. Sums are loaded and stored once a run: for wide values and 64 keys that takes the tiles longer than the
// products.
//
// A row's base is the maximum of its first unit and moves only when later weights exceed kMostSum. Each row
// decides on its own, from its own scores, so no row changes a bit of another. Precision: as attention_forward.h.
#pragma once
#include "cpu/amx/attention_forward.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kUnitRows = 32, kUnitKeys = 64, kUnitBlock = 256, kUnitGroup = kHalfGroup;
constexpr float kMostSum = 0x1p24f;    // of a row's weights of a unit in one lane
constexpr float kMostShift = 0x1p28f;  // beyond, the rounding of the shift alone is a power of 2 that could overflow
constexpr int64_t kUnitsMost = kUnitBlock / kUnitKeys * (kUnitGroup / kUnitRows);

struct Unit {
  const uint16_t *query, *key, *value;  // packed
  uint16_t* weights;
  float *sums, *totals, *shift;
  int64_t at, rows, first;  // query, how many, key
  int64_t place, size;      // in its run of neighbouring keys, of as many units
  bool fresh, edge;         // the first unit of its rows; not all its rows see all its keys
};

// Rows of keys and values to come. Each group of queries reads them again, from a cache that is far.
struct NextRows {
  const bfloat16 *key, *value;
  int64_t key_row, value_row, width, value_width, count;

  MK_INLINE void fetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i++) {
      for (int64_t j = 0; j < width; j += 32) __builtin_prefetch(key + i * key_row + j, 0, 2);
      for (int64_t j = 0; j < value_width; j += 32) __builtin_prefetch(value + i * value_row + j, 0, 2);
    }
  }
};

struct HalfUnits {
  static constexpr int64_t kScores = kUnitRows * kUnitKeys;
  uint16_t *query, *key, *value, *weights;
  float *sums, *totals, *shift, *scores;  // totals: 16 lanes a row; shift: -base, and +inf before any score
  Unit* units;
  int64_t width, value_width, stop, run, weight_row, used;  // run: units of a whole run

  static constexpr int64_t units_a_run(int64_t value_width) { return value_width > 64 ? 2 : 1; }
  static constexpr int64_t row_of_weights(int64_t run) {
    return run * kUnitKeys + (run > 1 ? 32 : 0);
  }  // not 256 bytes

  HalfUnits(const AttentionArgs& a, void* memory)
      : width(padded32(a.width)),
        value_width(padded32(a.value_width)),
        run(units_a_run(value_width)),
        weight_row(row_of_weights(run)) {
    Carver carver(memory);
    const int64_t rows = padded32(smaller(kUnitGroup, a.queries));
    query = carver.take<uint16_t>(rows * width);
    key = carver.take<uint16_t>(kUnitBlock * width);
    value = carver.take<uint16_t>(kUnitBlock * value_width);
    weights = carver.take<uint16_t>(2 * kUnitRows * weight_row);
    sums = carver.take<float>(rows * value_width);
    totals = carver.take<float>(rows * 16);
    shift = carver.take<float>(rows);
    scores = carver.take<float>(2 * kScores);
    units = carver.take<Unit>(kUnitsMost);
    used = carver.used();
  }
};

// One step of C[32][32] = or += A[32][32] B[32][32]: the upper or the lower half of the rows.
MK_INLINE void tile_step(bool clear, bool lower, bool first, bool last, const uint16_t* a, int64_t a_row,
                         const uint16_t* b, int64_t b_columns, float* c, int64_t c_row) {
  if (!lower) {
    if (first && clear) {
      _tile_zero(0);
      _tile_zero(1);
    } else if (first) {
      _tile_loadd(0, c, c_row * 4);
      _tile_loadd(1, c + 16, c_row * 4);
    }
    _tile_loadd(4, a, a_row * 2);
    _tile_loadd(6, b, b_columns * 4);
    _tile_loadd(7, b + 32, b_columns * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    return;
  }
  if (first && clear) {
    _tile_zero(2);
    _tile_zero(3);
  } else if (first) {
    _tile_loadd(2, c + 16 * c_row, c_row * 4);
    _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
  }
  _tile_loadd(5, a + 16 * a_row, a_row * 2);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  if (!last) return;
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + 16, c_row * 4);
  _tile_stored(2, c + 16 * c_row, c_row * 4);
  _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
}

// What weights of a run of units add to a share of the columns of its sums.
struct RunShare {
  const Unit* first;   // of the run; null: no run
  int64_t begin, end;  // blocks of 32 columns
};
// The share of the run before that accompanies a unit, as the unit lies in its own.
MK_INLINE RunShare run_share(const HalfUnits& w, const Unit& unit) {
  const Unit *mine = &unit - unit.place, *before = mine - 1;
  if (mine == w.units) return {nullptr, 0, 0};
  const int64_t blocks = w.value_width / 32;
  return {before - before->place, unit.place * blocks / unit.size, (unit.place + 1) * blocks / unit.size};
}

// The tile work that accompanies one unit: scores of `next`, then the share of a run.
class TileSteps {
 public:
  TileSteps(const HalfUnits& w, const Unit* next, float* next_scores, RunShare share)
      : share_(share), value_width_(w.value_width), weight_row_(w.weight_row) {
    const int64_t blocks = share.end - share.begin, depths = share.first ? 2 * share.first->size : 0;
    steps = (next ? w.width / 32 * 4 : 0) + blocks * depths * 2;
    if (next)
      begin(true, next->query, w.width, next->key, kUnitKeys, next_scores, kUnitKeys, w.width, kUnitKeys);
    else
      begin_sums(), lower_ = false;
  }
  MK_INLINE void step() {
    tile_step(clear_, lower_, depth_ == 0, depth_ + 32 == depths_, a_ + depth_, a_row_, b_ + depth_ * b_columns_,
              b_columns_, c_, c_row_);
    if (lower_ && (depth_ += 32) == depths_) {
      depth_ = 0, b_ += 64, c_ += 32;
      if (!(columns_ -= 32)) begin_sums();
    }
    lower_ = !lower_;
  }
  int64_t steps;

 private:
  MK_INLINE void begin(bool clear, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_columns, float* c,
                       int64_t c_row, int64_t depths, int64_t columns) {
    clear_ = clear, lower_ = false, a_ = a, a_row_ = a_row, b_ = b, b_columns_ = b_columns, c_ = c, c_row_ = c_row;
    depth_ = 0, depths_ = depths, columns_ = columns;
  }
  MK_INLINE void begin_sums() {
    if (const Unit* first = share_.first)
      begin(false, first->weights, weight_row_, first->value + share_.begin * 64, value_width_,
            first->sums + share_.begin * 32, value_width_, first->size * kUnitKeys, (share_.end - share_.begin) * 32);
    lower_ = true;  // step() turns it
  }

  RunShare share_;
  const uint16_t *a_ = nullptr, *b_ = nullptr;
  float* c_ = nullptr;
  int64_t value_width_, weight_row_, a_row_ = 0, b_columns_ = 0, c_row_ = 0, depth_ = 0, depths_ = 0, columns_ = 0;
  bool clear_ = false, lower_ = false;
};

// fast_power() where seen, with the mask for nothing.
MK_INLINE __m512 half_power(__m512 x, __mmask16 seen) {
  return _mm512_maskz_scalef_ps(seen, fast_power_of_fraction(_mm512_reduce_ps(x, 0x01)), x);
}

MK_INLINE uint64_t unit_sees(const AttentionArgs& a, const HalfUnits& w, const Unit& unit, int64_t row) {
  const Range all = seen_by(a, unit.at + row);
  const int64_t from = smaller(larger(all.first - unit.first, 0), kUnitKeys);
  const int64_t to = larger(smaller(smaller(all.last, w.stop) - unit.first, kUnitKeys), from);
  return _bzhi_u64(~uint64_t(0), unsigned(to)) & ~_bzhi_u64(~uint64_t(0), unsigned(from));
}

MK_INLINE __m512 unit_weights(const float* s, uint16_t* weights, uint64_t seen, __m512 factor, __m512 shift) {
  __m512 p[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++)
    p[v] = half_power(_mm512_fmadd_ps(_mm512_loadu_ps(s + 16 * v), factor, shift), __mmask16(seen >> (16 * v)));
  _mm512_storeu_si512(weights, two_bfloat16(p[0], p[1]));
  _mm512_storeu_si512(weights + 32, two_bfloat16(p[2], p[3]));
  return _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
}

MK_INLINE float unit_highest(const float* s, uint64_t seen) {
  __m512 most = _mm512_set1_ps(-kInfinity<float>);
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++)
    most = _mm512_mask_max_ps(most, __mmask16(seen >> (16 * v)), most, _mm512_loadu_ps(s + 16 * v));
  return _mm512_reduce_max_ps(most);
}

MK_INLINE void shrink_weights(uint16_t* weights, int64_t count, __m512 shrink) {
  for (int64_t k = 0; k < count; k += 32) {
    const __m512i x = _mm512_loadu_si512(weights + k);
    const auto wide = [](__m256i half) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    const __m512 low = wide(_mm512_castsi512_si256(x)), high = wide(_mm512_extracti64x4_epi64(x, 1));
    _mm512_storeu_si512(weights + k, two_bfloat16(_mm512_mul_ps(low, shrink), _mm512_mul_ps(high, shrink)));
  }
}

// A row whose base has to move, or that holds what is not finite: its older sums are scaled to the new base.
__attribute__((noinline)) void rebase_row(const HalfUnits& w, const Unit& unit, int64_t row, const float* s,
                                          uint16_t* weights, uint64_t seen, float factor) {
  const float old = -unit.shift[row], found = unit_highest(s, seen) * factor, base = found > old ? found : old;
  const float zero_point = base == -kInfinity<float> ? 0 : base;
  const __m512 sum = unit_weights(s, weights, seen, _mm512_set1_ps(factor), _mm512_set1_ps(-zero_point));
  const __m512 shrink = _mm512_broadcastss_ps(_mm512_castps512_ps128(fast_power(_mm512_set1_ps(old - zero_point))));
  float *totals = unit.totals + row * 16, *sums = unit.sums + row * w.value_width;
  _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), shrink, sum));
  for (int64_t j = 0; j < w.value_width; j += 16)
    _mm512_storeu_ps(sums + j, _mm512_mul_ps(shrink, _mm512_loadu_ps(sums + j)));
  unit.shift[row] = -base;
  // Weights that wait for their values: of the run's earlier units, and of the run before unless this unit ends it.
  const RunShare before = run_share(w, unit);
  shrink_weights((&unit - unit.place)->weights + row * w.weight_row, unit.place * kUnitKeys, shrink);
  if (before.first && before.first->sums == unit.sums && unit.place + 1 < unit.size)
    shrink_weights(before.first->weights + row * w.weight_row, before.first->size * kUnitKeys, shrink);
}

// A unit at work: `moved` collects the rows whose base has to move.
struct UnitRows {
  float* scores;
  float scale;
  uint32_t moved;

  UnitRows(const AttentionArgs& a, const HalfUnits& w, int64_t odd)
      : scores(w.scores + odd * w.kScores), scale(factor_after_cap<float>(a) * kUnit<float>), moved(0) {}

  template <bool edge, bool fresh, bool cap>
  MK_INLINE void row(const AttentionArgs& a, const HalfUnits& w, const Unit& unit, int64_t row) {
    float* s = scores + row * kUnitKeys;
    Vec<float> slope;
    for (int64_t k = 0; cap && k < kUnitKeys; k += 16) capped(a, Vec<float>::load(s + k), slope).store(s + k);
    const uint64_t seen = edge ? unit_sees(a, w, unit, row) : ~uint64_t(0);
    if (fresh) unit.shift[row] = -(unit_highest(s, seen) * scale);
    const __m512 sum = unit_weights(s, unit.weights + row * w.weight_row, seen, _mm512_set1_ps(scale),
                                    _mm512_set1_ps(unit.shift[row]));
    float* totals = unit.totals + row * 16;
    if (__builtin_expect(_mm512_cmp_ps_mask(sum, _mm512_set1_ps(kMostSum), _CMP_NLE_UQ), 0))
      moved |= 1u << row;
    else
      _mm512_storeu_ps(totals, _mm512_add_ps(_mm512_loadu_ps(totals), sum));
  }
  template <bool edge>
  MK_INLINE void rebase(const AttentionArgs& a, const HalfUnits& w, const Unit& unit) {
    for (; moved; moved &= moved - 1) {
      const int64_t row = __builtin_ctz(moved);
      rebase_row(w, unit, row, scores + row * kUnitKeys, unit.weights + row * w.weight_row,
                 edge ? unit_sees(a, w, unit, row) : ~uint64_t(0), scale);
    }
  }
};

template <bool edge, bool fresh, bool cap>
__attribute__((noinline)) void run_unit(const AttentionArgs& a, const HalfUnits& w, const Unit& unit, TileSteps tiles,
                                        int64_t odd) {
  UnitRows rows(a, w, odd);
  int64_t done = 0;
  for (int64_t row = 0; row < unit.rows; row++) {
    rows.row<edge, fresh, cap>(a, w, unit, row);
    for (; done * 32 < (row + 1) * tiles.steps; done++) tiles.step();
  }
  for (; done < tiles.steps; done++) tiles.step();
  rows.rebase<edge>(a, w, unit);
}

// The common units, 32 rows of width 64 or 128 amid whole runs, with all of their steps laid out: an eighth less time
// than the loop.
template <int kWidth, int kPlaceInRun, int kStep>
MK_INLINE void fixed_steps(const AttentionArgs& a, const HalfUnits& w, const Unit& unit, const Unit& past,
                           UnitRows& rows, float* next_scores) {
  constexpr int kSteps = kWidth / 4, kRowsAStep = int(kUnitRows) / kSteps, kPlace = kStep % (kSteps / 2) / 2;
  for (int row = 0; row < kRowsAStep; row++) rows.row<false, false, false>(a, w, unit, kStep * kRowsAStep + row);
  constexpr bool kScoring = kStep < kSteps / 2;
  constexpr int64_t kRun = HalfUnits::units_a_run(kWidth), kDepths = kScoring ? kWidth : kRun * kUnitKeys,
                    kColumns = kScoring ? kUnitKeys : kWidth;
  constexpr int64_t kDepth = kPlace * 32 % kDepths;
  constexpr int64_t kColumn = kPlace * 32 / kDepths * 32 + (kScoring ? 0 : kPlaceInRun * kWidth / kRun);
  constexpr int64_t kB = (kDepth / 2 * kColumns + kColumn) * 2;
  const Unit& next = *(&unit + 1);
  tile_step(kScoring, kStep % 2, kDepth == 0, kDepth + 32 == kDepths, (kScoring ? next.query : past.weights) + kDepth,
            kScoring ? kWidth : HalfUnits::row_of_weights(kRun), (kScoring ? next.key : past.value) + kB, kColumns,
            (kScoring ? next_scores : past.sums) + kColumn, kColumns);
  if constexpr (kStep + 1 < kSteps) fixed_steps<kWidth, kPlaceInRun, kStep + 1>(a, w, unit, past, rows, next_scores);
}
template <int kWidth, int kPlaceInRun>
__attribute__((noinline)) void run_fixed_unit(const AttentionArgs& a, const HalfUnits& w, const Unit& unit,
                                              const Unit& past, int64_t odd) {
  UnitRows rows(a, w, odd);
  fixed_steps<kWidth, kPlaceInRun, 0>(a, w, unit, past, rows, w.scores + (1 - odd) * w.kScores);
  rows.rebase<false>(a, w, unit);
}

MK_INLINE void run_tiles(TileSteps tiles) {
  asm volatile("" ::: "memory");  // the compiler does not know what tile loads read
  for (int64_t i = 0; i < tiles.steps; i++) tiles.step();
}

template <bool cap>
MK_INLINE void run_units(const AttentionArgs& a, const HalfUnits& w, int64_t count, const NextRows& next) {
  if (count == 0) return;
  const bool square = w.width == w.value_width && (w.width == 64 || w.width == 128) && !cap;
  run_tiles({w, w.units, w.scores, {nullptr, 0, 0}});
  for (int64_t i = 0; i < count; i++) {
    const Unit& unit = w.units[i];
    const RunShare share = run_share(w, unit);
    next.fetch(i * next.count / count, (i + 1) * next.count / count);
    asm volatile("" ::: "memory");
    if (square && share.first && share.first->size == w.run && unit.size == w.run && i + 1 < count &&
        unit.rows == kUnitRows && !unit.edge && !unit.fresh) {
      const auto run = w.width == 64 ? run_fixed_unit<64, 0>
                       : unit.place  ? run_fixed_unit<128, 1>
                                     : run_fixed_unit<128, 0>;
      run(a, w, unit, *share.first, i % 2);
      continue;
    }
    const auto run = unit.edge    ? unit.fresh ? run_unit<true, true, cap> : run_unit<true, false, cap>
                        : unit.fresh ? run_unit<false, true, cap>
                                  : run_unit<false, false, cap>;
    run(a, w, unit, {w, i + 1 < count ? &unit + 1 : nullptr, w.scores + (1 - i % 2) * w.kScores, share}, i % 2);
  }
  const Unit& last = w.units[count - 1];
  run_tiles({w, nullptr, nullptr, {&last - last.place, 0, w.value_width / 32}});
}

// Units of queries [begin, end) against the packed keys [first, first + keys).
MK_INLINE int64_t list_units(const AttentionArgs& a, const HalfUnits& w, int64_t begin, int64_t end, int64_t first,
                             int64_t keys, uint64_t& started) {
  int64_t count = 0, runs = 0;
  for (int64_t row = 0; row < end - begin; row += kUnitRows) {
    const int64_t rows = smaller(kUnitRows, end - begin - row), at = begin + row;
    const Range block = seen_by_block(a, at, at + rows, first, first + keys);
    const Range top = seen_by(a, at), bottom = seen_by(a, at + rows - 1);
    const int64_t start = block.first / kUnitKeys * kUnitKeys;
    for (int64_t key = start; key < block.last; key += kUnitKeys) {
      const int64_t index = (key - start) / kUnitKeys, place = index % w.run;
      const int64_t left = (block.last - key + kUnitKeys - 1) / kUnitKeys + place;
      runs += place == 0;
      const int64_t low = first + key, high = low + kUnitKeys;
      const uint64_t bit = uint64_t(1) << (row / kUnitRows);
      w.units[count++] = {w.query + row * w.width,
                          w.key + key * w.width,
                          w.value + key * w.value_width,
                          w.weights + runs % 2 * kUnitRows * w.weight_row + place * kUnitKeys,
                          w.sums + row * w.value_width,
                          w.totals + row * 16,
                          w.shift + row,
                          at,
                          rows,
                          low,
                          place,
                          smaller(w.run, left),
                          !(started & bit),
                          bottom.first > low || top.last < high || w.stop < high};
      started |= bit;
    }
  }
  return count;
}

// False where a value is not finite: the tiles cannot leave it out for the queries that do not see it.
bool unit_blocks(const AttentionArgs& a, HalfUnits& w, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t start,
                 int64_t stop) {
  const int64_t shared = h / (a.heads / a.key_heads), rows = end - begin, rows32 = padded32(rows);
  const Tiles tiles;
  w.stop = stop;
  pack_plain_halves(rows_of<bfloat16>(a.query, b, h, begin), a.query.row, rows, a.width, w.query, rows32);
  for (int64_t i = 0; i < rows32 * w.value_width; i++) w.sums[i] = 0;
  for (int64_t i = 0; i < rows32 * 16; i++) w.totals[i] = 0;
  for (int64_t i = 0; i < rows32; i++) w.shift[i] = kInfinity<float>;
  for (int64_t i = 0; i < 2 * kUnitRows * w.weight_row; i++) w.weights[i] = 0;
  const Range seen = seen_by_block(a, begin, end, start, stop);
  uint64_t started = 0;
  for (int64_t first = start + seen.first / kUnitBlock * kUnitBlock; first < start + seen.last; first += kUnitBlock) {
    const int64_t keys = smaller(kUnitBlock, stop - first);
    for (int64_t key = 0; key < keys; key += kUnitKeys)
      pack_pairs_across(rows_of<bfloat16>(a.key, b, shared, first + key), a.key.row, smaller(kUnitKeys, keys - key),
                        a.width, w.key + key * w.width, kUnitKeys);
    if (pack_pairs_down(rows_of<bfloat16>(a.value, b, shared, first), a.value.row, keys, a.value_width, w.value,
                        (keys + kUnitKeys - 1) / kUnitKeys * kUnitKeys))
      return false;
    const int64_t count = list_units(a, w, begin, end, first, keys, started);
    const int64_t after = first + kUnitBlock, more = larger(smaller(kUnitBlock, start + seen.last - after), 0);
    const NextRows next = {rows_of<bfloat16>(a.key, b, shared, after),
                           rows_of<bfloat16>(a.value, b, shared, after),
                           a.key.row,
                           a.value.row,
                           a.width,
                           a.value_width,
                           more};
    a.softcap > 0 ? run_units<true>(a, w, count, next) : run_units<false>(a, w, count, next);
  }
  return true;
}

// The base -shift, a power of 2, as a natural one; returns what sums relative to it are multiplied by, since it is
// rounded.
MK_INLINE float natural_base(float shift, float& base) {
  base = float(-double(shift) * 0.69314718055994530942);
  if (__builtin_isinf(shift)) return 1;
  const double x = -double(shift) * 0.69314718055994530942 - double(base);
  return float(__builtin_fabs(x) < 1e-3 ? 1 + x * (1 + x * (0.5 + x * (1.0 / 6))) : __builtin_exp(x));
}

void half_forward(const AttentionArgs& a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t split,
                  void* memory) {
  if (a.queries <= kFewHalves || !a.width) return forward<float, bfloat16>(a, b, h, begin, end, split, memory);
  if (needs_bias(a) || a.seed) return half_forward_biased(a, b, h, begin, end, split, memory);
  HalfUnits w(a, memory);
  const int64_t start = split * a.split_keys, stop = smaller(start + a.split_keys, a.seen_keys), rows = end - begin;
  bool done = unit_blocks(a, w, b, h, begin, end, start, stop);
  for (int64_t i = 0; done && i < rows; i++)
    done = !(__builtin_fabsf(w.shift[i]) > kMostShift) || __builtin_isinf(w.shift[i]);
  if (!done) return forward_by_blocks(a, b, h, begin, end, split, memory);
  for (int64_t i = 0; i < rows; i++) {
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(w.totals + i * 16));
    float base, *sums = w.sums + i * w.value_width;
    const float factor = natural_base(w.shift[i], base);
    for (int64_t j = 0; j < w.value_width; j++) sums[j] *= factor;
    half_result(a, b, h, begin + i, split, sums, base, total * factor);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
