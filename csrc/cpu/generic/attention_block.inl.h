// What forward and backward of attention share: packed panels, the register-tiled product, masks, dropout, powers.
//
// A panel of B[depth][columns] holds kPanel columns (the last one: as many whole vectors as are left), zero padded, row
// after row. The product keeps kRows x kPanel sums in registers and reads A by two strides, so A may be a transposed
// block. Everything is in the accumulation type A: float for float and the half types, double for double.
#pragma once
#include "cpu/attention.h"
#include "cpu/generic/gates.inl.h"
#include "cpu/generic/streaming.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
constexpr int64_t kLanes = Vec<A>::kLanes;
constexpr int kRows = 6;
template <class A>
constexpr int kTileVectors = Vec<A>::kLanes * sizeof(A) == 64 ? 4 : 2;
template <class A>
constexpr int64_t kPanel = kTileVectors<A>* kLanes<A>;

template <class A>
MK_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}
MK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What power() takes: base 2 for float, base e for double. Scores are natural and rounded, as their maximum is: their
// difference has no rounding to grow into a factor, and a mask of the lowest number does not overflow.
template <class A>
constexpr A kUnit = sizeof(A) == 4 ? A(1.4426950408889634074) : A(1);
template <class A>
constexpr A kInfinity = A(__builtin_inf());

#if !MK_HAVE_POWER
// 2^x for x <= 0, relative error 1e-8 before rounding: minimax polynomial of 2^r on [-1/2, 1/2], computed for this
// file.
MK_INLINE Vec<float> power(Vec<float> x) {
  using V = Vec<float>;
  constexpr float c[7] = {0.000154697319775f,
                          0.00134100009661f,
                          0.00961803078251f,
                          0.055502973142f,
                          0.240226510841f,
                          0.693147225395f,
                          1.0f};
  const V t = max(V::set1(-160.0f), x), n = round(t);  // max returns its second argument for NaN
  return scale(polynomial(t - n, c), n);
}
#endif
MK_INLINE Vec<double> power(Vec<double> x) { return exp(x); }

// exp(score - base) of scores that still lack their factor.
template <class A>
MK_INLINE Vec<A> power_of(Vec<A> score, Vec<A> factor, Vec<A> base) {
  return power((score * factor - base) * Vec<A>::set1(kUnit<A>));
}

// Bytes that a product has brought into the L2 cache meanwhile: `step` of them at each depth of a tile, which costs it
// nothing. Prefetches that come in bursts wait for each other instead.
struct Ahead {
  const char* at;
  int64_t step;
};

// C[M][N vectors] = row_scale C + A B, or + 0 where `add` is false.
template <class A, int M, int N>
__attribute__((noinline)) void tile_product(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b,
                                            int64_t b_row, A* c, int64_t c_row, const A* row_scale, bool add,
                                            Ahead ahead) {
  using V = Vec<A>;
  V sum[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; m++)
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) sum[m][n] = V::zero();
  const int64_t a_row4 = 4 * a_row;
  const A *a4 = a + a_row4, *a8 = a4 + a_row4;
  for (int64_t k = 0; k < depth; k++, b += b_row, a += a_depth, a4 += a_depth, a8 += a_depth) {
    __builtin_prefetch(ahead.at + k * ahead.step, 0, 2);
    V right[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) right[n] = V::load(b + n * V::kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const V left = V::set1((m < 4 ? a : m < 8 ? a4 : a8)[m % 4 * a_row]);
#pragma GCC unroll 12
      for (int n = 0; n < N; n++) sum[m][n] = fma(left, right[n], sum[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    const V factor = row_scale ? V::set1(row_scale[m]) : V::set1(A(1));
#pragma GCC unroll 12
    for (int n = 0; n < N; n++) {
      A* out = c + m * c_row + n * V::kLanes;
      if (add) sum[m][n] = fma(V::load(out), factor, sum[m][n]);
      sum[m][n].store(out);
    }
  }
}

template <class A>
using TileProduct = void (*)(int64_t, const A*, int64_t, int64_t, const A*, int64_t, A*, int64_t, const A*, bool,
                             Ahead);
template <class A, int N>
constexpr TileProduct<A> kTileRow[kRows] = {tile_product<A, 1, N>, tile_product<A, 2, N>, tile_product<A, 3, N>,
                                            tile_product<A, 4, N>, tile_product<A, 5, N>, tile_product<A, 6, N>};
// One vector across, twice the rows: six sums would wait for each other.
template <class A>
MK_INLINE int64_t rows_of_tile(int64_t vectors, int64_t rows) {
  return vectors == 1 && rows >= 2 * kRows ? 2 * kRows : smaller(kRows, rows);
}
template <class A>
MK_INLINE TileProduct<A> tile_of(int64_t rows, int64_t vectors) {
  if constexpr (kTileVectors<A> == 4) {
    if (vectors == 4) return kTileRow<A, 4>[rows - 1];
    if (vectors == 3) return kTileRow<A, 3>[rows - 1];
  }
  if (rows > kRows) return tile_product<A, 2 * kRows, 1>;
  return vectors == 2 ? kTileRow<A, 2>[rows - 1] : kTileRow<A, 1>[rows - 1];
}

// The matrices of a product. B: panels of `panel_depth` rows, used from row `depth_first`, or plain rows `b_row` apart.
template <class A>
struct Product {
  const A* a;
  int64_t a_row, a_depth;
  const A* b;
  int64_t panel_depth, depth_first;
  A* c;
  int64_t c_row;
  int64_t b_row = 0;
  const void* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

// Rows [0, rows) and column vectors of the panels that cover columns [first, last); `depth` terms a sum, long sums in
// pieces, which keeps their rounding errors near those of a blocked matrix product.
template <class A>
void product(const Product<A>& p, int64_t rows, int64_t columns, int64_t first, int64_t last, int64_t depth,
             const A* row_scale, bool add) {
  const int64_t vectors = padded<A>(columns) / kLanes<A>, piece = depth > 256 ? 64 : depth;
  Ahead ahead = {reinterpret_cast<const char*>(p.a), 0};
  if (p.ahead) {
    const int64_t tiles = (rows / (vectors == 1 ? 2 * kRows : kRows) + 1) * (vectors / kTileVectors<A> + 1);
    ahead = {static_cast<const char*>(p.ahead), smaller(64, p.ahead_bytes / (tiles * depth + 1))};
  }
  for (int64_t panel = first / kPanel<A>; panel * kPanel<A> < last; panel++) {
    const int64_t width = smaller(kTileVectors<A>, vectors - panel * kTileVectors<A>);
    const int64_t b_row = p.b_row ? p.b_row : width * kLanes<A>;
    const A* b = p.b + panel * kPanel<A> * (p.b_row ? 1 : p.panel_depth) + p.depth_first * b_row;
    for (int64_t row = 0, count; row < rows; row += count) {
      count = rows_of_tile<A>(width, rows - row);
      A* c = p.c + row * p.c_row + panel * kPanel<A>;
      int64_t done = 0;
      do {
        tile_of<A>(count, width)(smaller(piece, depth - done), p.a + row * p.a_row + done * p.a_depth, p.a_row,
                                 p.a_depth, b + done * b_row, b_row, c, p.c_row,
                                 row_scale && !done ? row_scale + row : nullptr, add || done, ahead);
        ahead.at += ahead.step * smaller(piece, depth - done);
        done += piece;
      } while (done < depth);
    }
  }
}

// Panels [rows][columns] of a block whose rows lie `stride` apart. With `clean`, what is not finite becomes 0; returns
// whether anything was.
template <bool clean, class A, class T>
bool pack_rows(const T* in, int64_t stride, int64_t rows, int64_t columns, A* out) {
  using V = Vec<A>;
  V least = V::zero();  // x - x is NaN where x is not finite, and NaN stays
  for (int64_t column = 0; column < columns; column += kPanel<A>) {
    const int64_t width = smaller(kPanel<A>, columns - column);
    for (int64_t row = 0; row < rows; row++)
      for_each_vec<V>(width, [&](int64_t j, auto part) {
        const V x = load<V>(in + row * stride + column + j, part);
        if (clean) least = least + (x - x);
        x.store(out);
        out += V::kLanes;
      });
  }
  if (!clean || reduce_add(least) == A(0)) return false;
  out -= rows * padded<A>(columns);
  for (int64_t i = 0; i < rows * padded<A>(columns); i += V::kLanes) {
    const V x = V::load(out + i);
    select(abs(x) < V::set1(kInfinity<A>), x, V::zero()).store(out + i);
  }
  return true;
}

#if !MK_HAVE_TRANSPOSE
template <class V, int N>
MK_INLINE void transpose(V (&r)[N]) {
  typename V::T cells[N][N];
  for (int i = 0; i < N; i++) r[i].store(cells[i]);
  for (int i = 0; i < N; i++)
    for (int j = 0; j < i; j++) {
      const typename V::T kept = cells[i][j];
      cells[i][j] = cells[j][i], cells[j][i] = kept;
    }
  for (int i = 0; i < N; i++) r[i] = V::load(cells[i]);
}
#endif

// Panels [columns of the block][its rows]: the transposed block, as many vectors as hold its rows.
template <class A, class T>
void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t columns, A* out) {
  using V = Vec<A>;
  constexpr int kSize = V::kLanes;
  for (int64_t row = 0; row < rows; row += kPanel<A>) {
    const int64_t width = padded<A>(smaller(kPanel<A>, rows - row));
    for (int64_t j = 0; j < width; j += kSize)
      for (int64_t column = 0; column < columns; column += kSize) {
        const int64_t count = smaller(kSize, rows - row - j), across = smaller(kSize, columns - column);
        V block[kSize];
        const T* from = in + (row + j) * stride + column;
        if (count == kSize && across == kSize) {
#pragma GCC unroll 16
          for (int i = 0; i < kSize; i++) block[i] = V::load(from + i * stride);
        } else {
          for (int i = 0; i < kSize; i++) block[i] = i < count ? V::load(from + i * stride, across) : V::zero();
        }
        transpose(block);
        for (int i = 0; i < across; i++) block[i].store(out + (column + i) * width + j);
      }
    out += columns * width;
  }
}

// Row-major copy in the accumulation type.
template <class A, class T>
void pack_plain(const T* in, int64_t stride, int64_t rows, int64_t columns, A* out) {
  using V = Vec<A>;
  const int64_t row_size = padded<A>(columns);
  for (int64_t row = 0; row < rows; row++)
    for_each_vec<V>(
        columns, [&](int64_t j, auto part) { load<V>(in + row * stride + j, part).store(out + row * row_size + j); });
}

// The keys that a query may see by its position alone.
struct Range {
  int64_t first, last;
};
MK_INLINE Range seen_by(const AttentionArgs& a, int64_t query) {
  const int64_t at = query + a.shift;
  const int64_t first = a.left < 0 ? 0 : smaller(larger(at - a.left, 0), a.seen_keys);
  const int64_t last = a.right < 0 ? a.seen_keys : smaller(larger(at + a.right + 1, 0), a.seen_keys);
  return {first, larger(first, last)};
}
// The union over queries [begin, end), inside keys [first, last) and relative to `first`; empty: {0, 0}.
MK_INLINE Range seen_by_block(const AttentionArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const Range top = seen_by(a, begin), bottom = seen_by(a, end - 1);
  const int64_t from = larger(top.first, first) - first, to = smaller(bottom.last, last) - first;
  return from < to ? Range{from, to} : Range{0, 0};
}

// softcap tanh(scale product / softcap) and its slope 1 - tanh^2, both from e^|2x| - 1: relative errors of some ulp.
template <class A>
MK_INLINE Vec<A> capped(const AttentionArgs& a, Vec<A> product, Vec<A>& slope) {
  using V = Vec<A>;
  constexpr A kMost = sizeof(A) == 4 ? 80 : 700;  // the slope is 1e-35 there, and e^kMost is finite
  const V one = V::set1(1), x = product * V::set1(A(2 * a.scale / a.softcap));
  V n;
  const V p = reduced_expm1(min(V::set1(kMost), abs(x)), n), power_of_2 = scale(one, n);  // min passes NaN on
  const V e = fma(p, power_of_2, power_of_2 - one), inverse = quotient(one, e + V::set1(2));
  slope = V::set1(4) * ((e + one) * inverse) * inverse;
  return copysign(V::set1(A(a.softcap)) * (e * inverse), x);
}
// Products [begin, end) of one query, a whole number of vectors, become capped scores; slopes where wanted.
template <class A>
__attribute__((noinline)) void cap_scores(const AttentionArgs& a, A* s, int64_t begin, int64_t end, A* slopes) {
  Vec<A> slope;
  for (int64_t k = begin; k < end; k += kLanes<A>) {
    capped(a, Vec<A>::load(s + k), slope).store(s + k);
    if (slopes) slope.store(slopes + k);
  }
}
// What dscores before the cap are, 0 also where a slope that nobody sees is not finite.
template <class A>
MK_INLINE void slope_gradients(A* gradients, const A* slopes, int64_t begin, int64_t end) {
  using V = Vec<A>;
  for (int64_t k = begin; k < end; k += kLanes<A>) {
    const V g = V::load(gradients + k);
    select(g == V::zero(), V::zero(), g * V::load(slopes + k)).store(gradients + k);
  }
}
// The factor that products lack when cap_scores() is through with them.
template <class A>
MK_INLINE A factor_after_cap(const AttentionArgs& a) {
  return a.softcap > 0 ? A(1) : A(a.scale);
}

// The score that joins the softmax of every row of a head.
template <class A, class T>
MK_INLINE A sink_of(const AttentionArgs& a, int64_t h) {
  return a.sink ? A(to_float(static_cast<const T*>(a.sink)[h * a.sink_h])) : -kInfinity<A>;
}
// The sink joins a row's softmax, and may raise its base; returns what older sums must be multiplied by.
template <class A>
MK_INLINE A join_sink(A sink, A& base, A& total) {
  if (sink == -kInfinity<A>) return 1;
  if (!(sink > base)) {
    total += A(__builtin_exp(double(sink) - double(base)));
    return 1;
  }
  const A shrink = A(__builtin_exp(double(base) - double(sink)));
  base = sink, total = total * shrink + 1;
  return shrink;
}

// The mask of one query over keys first + [begin, end): bias[begin..end); 0 or -inf of a boolean one.
template <class A, class T>
__attribute__((nothrow)) void load_mask(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, int64_t first,
                                        int64_t begin, int64_t end, A* bias) {
  const int64_t offset = b / a.mask_group * a.mask_b + h * a.mask_h + query * a.mask_q + first * a.mask_k;
  if (a.mask_boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + offset;
    if (a.mask_k)
      for (int64_t k = begin; k < end; k++) bias[k] = mask[k] ? A(0) : -kInfinity<A>;
    else
      for (int64_t k = begin; k < end; k++) bias[k] = mask[0] ? A(0) : -kInfinity<A>;
    return;
  }
  using V = Vec<A>;
  const T* mask = static_cast<const T*>(a.mask) + offset;
  for (int64_t k = begin; k < end; k += V::kLanes) {
    (!a.mask_k              ? V::set1(to_float(mask[0]))
     : end - k >= V::kLanes ? V::load(mask + k)
                            : V::load(mask + k, end - k))
        .store(bias + k);
  }
}

// Rows of a mask lie pages apart, where no hardware prefetcher follows: those of a block are on their way while its
// products are computed.
template <class T>
MK_INLINE void fetch_mask(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, int64_t rows, int64_t first,
                          Range block) {
  if (!a.mask || a.mask_boolean || !a.mask_k) return;
  const T* mask = static_cast<const T*>(a.mask) + b / a.mask_group * a.mask_b + h * a.mask_h + first;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = block.first; k < block.last; k += int64_t(64 / sizeof(T)))
      __builtin_prefetch(mask + (query + i) * a.mask_q + k, 0, 2);
}

MK_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}
// What the weights of one query over keys first + [begin, end) are multiplied by; the hash is specified in
// backends/reference/_dropout.py.
template <class A>
__attribute__((nothrow)) void load_kept(const AttentionArgs& a, int64_t b, int64_t h, int64_t query, int64_t first,
                                        int64_t begin, int64_t end, A* kept) {
  constexpr uint32_t kGolden = 0x9E3779B9u;
  const uint64_t seed = uint64_t(a.seed[b * a.seed_b]);
  const uint32_t row = mix(mix(uint32_t(seed) + uint32_t(query) * kGolden) + uint32_t(h) * kGolden),
                 second = mix(row ^ uint32_t(seed >> 32));
  const A scale = a.drop_all ? A(0) : A(a.keep_scale);
  const uint32_t threshold = a.threshold, start = row + uint32_t(first) * kGolden;
  for (int64_t k = begin; k < end; k++) {
    uint32_t x = start + uint32_t(k) * kGolden;
    x = (x ^ x >> 16) * 0x85EBCA6Bu ^ second;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    kept[k] = (x ^ x >> 16) >= threshold ? scale : A(0);
  }
}

// NaN in row i of `sums` where weight[i][k] is not 0 and element [k][j] of the block is not finite: the panels hold 0
// there.
template <class A, class T>
void spill(const A* weights, int64_t weights_row, int64_t rows, Range keys, const T* block, int64_t stride,
           int64_t columns, A* sums, int64_t sums_row) {
  for (int64_t k = keys.first; k < keys.last; k++)
    for (int64_t j = 0; j < columns; j++) {
      const A x = to_float(block[k * stride + j]);
      if (x - x == A(0)) continue;
      for (int64_t i = 0; i < rows; i++)
        if (!(weights[i * weights_row + k] == A(0))) sums[i * sums_row + j] = A(__builtin_nan(""));
    }
}

// Scratch of one call, handed out in 64-byte steps; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : at_(reinterpret_cast<uintptr_t>(base)), base_(at_) {}
  template <class A>
  A* take(int64_t count) {
    A* out = reinterpret_cast<A*>(at_);
    at_ +=
        (uintptr_t(count) * sizeof(A) + 64 + 63) / 64 * 64;  // one vector more: loads of whole vectors may pass the end
    return out;
  }
  int64_t used() const { return int64_t(at_ - base_); }

 private:
  uintptr_t at_, base_;
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
