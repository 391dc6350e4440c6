// Three passes over a tile of matrix rows that lies in the L1 or L2 cache: dot products, weighted sums, and rows made
// of keys. A tile is given by the offsets of its rows, so that rows hidden by a mask are never touched. Per-row numbers
// of head h (weights, dot products) lie at x[h * kTile + i]. Precision: the accumulation type throughout.
#pragma once

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kTile = 64;  // most rows a tile has; a multiple of every vector length
constexpr int64_t kAhead = 4;  // tiles from the one worked on to the one fetched: less does not hide the memory

// Asks for a line of every page of `bytes`: where a page lies takes as long to look up as a line takes to come, and the
// fetches of its lines would wait for that.
MK_INLINE void touch_pages(const void* from, int64_t bytes) {
  constexpr int64_t kPage = 4096;
  const char* data = static_cast<const char*>(from);
  const int64_t first = -reinterpret_cast<intptr_t>(data) & (kPage - 1);
  for (int64_t at = first; at < bytes; at += kPage) __builtin_prefetch(data + at, 0, 2);
}

template <class S>
struct Rows {
  const S* base;
  int64_t stride;
  const int32_t* index;  // of the `count` rows that take part
  int64_t count, width;
  const S* ahead = nullptr;  // the first row of a whole tile kAhead tiles further, read into the L2 cache meanwhile
  bool one_pass = false;     // only one pass over this tile fetches that one
  MK_INLINE const S* row(int64_t i) const { return base + index[i] * stride; }
  // The first pass fetches the first half of that tile, the last one the other half, in the order of the
  // addresses: one pass alone would wait for the memory, and the hardware prefetcher follows.
  template <int kPart>
  MK_INLINE void fetch(int64_t i, int64_t column, int64_t columns) const {
    if (!ahead) return;
    constexpr int64_t kLine = 64 / int64_t(sizeof(S));
    if (one_pass) {
      for (int64_t j = column; j < column + columns; j += kLine) __builtin_prefetch(ahead + i * stride + j, 0, 2);
      return;
    }
    const int64_t half = (columns / 2 + kLine - 1) / kLine * kLine, from = i % 2 ? half : 0,
                  to = i % 2 ? columns : half;
    const S* row = ahead + (kPart * rows_half() + i / 2) * stride + column;
    for (int64_t j = from; j < to; j += kLine) __builtin_prefetch(row + j, 0, 2);
  }
  MK_INLINE int64_t rows_half() const { return count / 2; }
  // The softmax of a head reads nothing from memory: some of what one pass alone fetches, so that the memory goes on
  // meanwhile (attention of 1 and 4 queries over 268 MB: 5% in float32, 10% in bfloat16; content_read with values: 8%).
  MK_INLINE void fetch_early(int64_t head) const {
    if (!ahead || !one_pass) return;
    constexpr int64_t kLine = 64 / int64_t(sizeof(S)), kEach = 6;
    for (int64_t i = head * kEach; i < count && i < (head + 1) * kEach; i++)
      for (int64_t j = 0; j < width; j += kLine) __builtin_prefetch(ahead + i * stride + j, 0, 2);
  }
  // The pages of the tile after the one that is fetched: a tenth of the time of one pass over memory in small pages,
  // and as much lost where two passes share the fetching.
  MK_INLINE void touch() const {
    if (ahead && one_pass && stride == width) touch_pages(ahead + kTile * stride, kTile * stride * int64_t(sizeof(S)));
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

enum class Dot { plain, squares, distance };

// A group of n rows, N vectors of columns: lanes[h][i][kLanes] (+)= products of key h and row i, lane by lane.
template <class S, int H, Dot kDot, int N, class Part>
MK_INLINE void dot_columns(const Rows<S>& rows, int64_t first, int64_t n, int64_t column, const acc_t<S>* key,
                           acc_t<S>* lanes, Part part) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  constexpr bool kSquares = kDot == Dot::squares;
  V k[H][N];
  for (int h = 0; h < H; h++)
    for (int l = 0; l < N; l++) k[h][l] = load<V>(key + h * rows.width + column + l * L, part);
  for (int64_t i = 0; i < n; i++) {
    const S* row = rows.row(first + i) + column;
    rows.template fetch<0>(first + i, column, N * L);
    V sum[H + 1];
    for (int h = 0; h < H + kSquares; h++) sum[h] = column ? V::load(lanes + (h * L + i) * L) : V::zero();
    for (int l = 0; l < N; l++) {
      const V m = load<V>(row + l * L, part);
      for (int h = 0; h < H; h++) {
        const V x = kDot == Dot::distance ? k[h][l] - m : k[h][l];
        sum[h] = fma(x, kDot == Dot::distance ? x : m, sum[h]);
      }
      if constexpr (kSquares) sum[H] = fma(m, m, sum[H]);
    }
    for (int h = 0; h < H + kSquares; h++) sum[h].store(lanes + (h * L + i) * L);
  }
}

// out[h][i] = key[h] . row i, or |key[h] - row i|^2; with Dot::squares also squares[i] = |row i|^2.
template <class S, int H, Dot kDot>
void dot_rows_of(const Rows<S>& rows, const acc_t<S>* key, acc_t<S>* out, acc_t<S>* squares) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  alignas(64) acc_t<S> lanes[(H + 1) * L * L];
  for (int64_t i = 0; i < (H + 1) * L * L; i += L) V::zero().store(lanes + i);
  for (int64_t first = 0; first < rows.count; first += L) {
    const int64_t n = rows.count - first < L ? rows.count - first : L;
    int64_t j = 0;
    for (; j + 4 * L <= rows.width; j += 4 * L) dot_columns<S, H, kDot, 4>(rows, first, n, j, key, lanes, Full{});
    for (; j + L <= rows.width; j += L) dot_columns<S, H, kDot, 1>(rows, first, n, j, key, lanes, Full{});
    if (j < rows.width) dot_columns<S, H, kDot, 1>(rows, first, n, j, key, lanes, Tail{rows.width - j});
    for (int h = 0; h < H; h++) reduce_add_each(lanes + h * L * L).store(out + h * kTile + first);
    if constexpr (kDot == Dot::squares) reduce_add_each(lanes + H * L * L).store(squares + first);
  }
}

template <class S, Dot kDot>
void dot_rows(Rows<S> rows, int64_t heads, const acc_t<S>* key, acc_t<S>* out, acc_t<S>* squares = nullptr) {
  rows.touch();
  for (int64_t h = 0; h < heads; h += 4, key += 4 * rows.width, out += 4 * kTile, rows.ahead = nullptr) {
    switch (heads - h) {
      case 1:
        dot_rows_of<S, 1, kDot>(rows, key, out, squares);
        break;
      case 2:
        dot_rows_of<S, 2, kDot>(rows, key, out, squares);
        break;
      case 3:
        dot_rows_of<S, 3, kDot>(rows, key, out, squares);
        break;
      default:
        dot_rows_of<S, 4, kDot>(rows, key, out, squares);
    }
  }
}

// sums[h][0 .. vectors) += sum_i weights[h][i] row i, with the sums of the tile in registers (short sums round less
// than one long one).
template <class S, int H, int N, class Part>
MK_INLINE void add_columns(const Rows<S>& rows, int64_t column, const acc_t<S>* weights, acc_t<S>* sums, Part part) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  V sum[H][N];
  for (int h = 0; h < H; h++)
    for (int l = 0; l < N; l++) sum[h][l] = V::zero();
  for (int64_t i = 0; i < rows.count; i++) {
    const S* row = rows.row(i) + column;
    rows.template fetch<1>(i, column, N * L);
    V m[N];
    for (int l = 0; l < N; l++) m[l] = load<V>(row + l * L, part);
    for (int h = 0; h < H; h++) {
      const V w = V::set1(weights[h * kTile + i]);
      for (int l = 0; l < N; l++) sum[h][l] = fma(w, m[l], sum[h][l]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int l = 0; l < N; l++) {
      acc_t<S>* to = sums + h * rows.width + column + l * L;
      store(load<V>(to, part) + sum[h][l], to, part);
    }
}

template <class S, int H>
void add_rows_of(const Rows<S>& rows, const acc_t<S>* weights, acc_t<S>* sums) {
  constexpr int64_t L = Vec<acc_t<S>>::kLanes;
  int64_t j = 0;
  for (; j + 4 * L <= rows.width; j += 4 * L) add_columns<S, H, 4>(rows, j, weights, sums, Full{});
  for (; j + L <= rows.width; j += L) add_columns<S, H, 1>(rows, j, weights, sums, Full{});
  if (j < rows.width) add_columns<S, H, 1>(rows, j, weights, sums, Tail{rows.width - j});
}

// sums[h] += sum_i weights[h][i] row i.
template <class S>
void add_rows(Rows<S> rows, int64_t heads, const acc_t<S>* weights, acc_t<S>* sums) {
  rows.touch();
  for (int64_t h = 0; h < heads; h += 4, weights += 4 * kTile, sums += 4 * rows.width, rows.ahead = nullptr) {
    switch (heads - h) {
      case 1:
        add_rows_of<S, 1>(rows, weights, sums);
        break;
      case 2:
        add_rows_of<S, 2>(rows, weights, sums);
        break;
      case 3:
        add_rows_of<S, 3>(rows, weights, sums);
        break;
      default:
        add_rows_of<S, 4>(rows, weights, sums);
    }
  }
}

// A sum over heads of per-row numbers times vectors: sum_h scalar[h][i] vector[h].
template <class A>
struct Outer {
  const A *scalar, *vector;  // null: absent
};

// out row i = outer products of x and y at row i - shrink[i] * row i, rounded once. The row part only with shrink.
template <class S>
void mix_rows(const Rows<S>& rows, int64_t heads, Outer<acc_t<S>> x, Outer<acc_t<S>> y, const acc_t<S>* shrink,
              S* out) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const auto columns = [&](int64_t i, int64_t j, auto part, auto count) {
    constexpr int N = decltype(count)::value;
    V sum[N];
    for (int l = 0; l < N; l++)
      sum[l] = shrink ? V::set1(-shrink[i]) * load<V>(rows.row(i) + j + l * L, part) : V::zero();
    const auto add = [&](const Outer<acc_t<S>>& o) {
      if (!o.scalar) return;
      for (int64_t h = 0; h < heads; h++) {
        const V s = V::set1(o.scalar[h * kTile + i]);
        for (int l = 0; l < N; l++) sum[l] = fma(s, load<V>(o.vector + h * rows.width + j + l * L, part), sum[l]);
      }
    };
    add(x);
    add(y);
    S* to = out + int64_t(rows.index[i]) * rows.width + j;
    for (int l = 0; l < N; l++) store(sum[l], to + l * L, part);
  };
  for (int64_t i = 0; i < rows.count; i++) {
    int64_t j = 0;
    for (; j + 4 * L <= rows.width; j += 4 * L) columns(i, j, Full{}, Count<4>{});
    for (; j + L <= rows.width; j += L) columns(i, j, Full{}, Count<1>{});
    if (j < rows.width) columns(i, j, Tail{rows.width - j}, Count<1>{});
  }
}

// The same vectors in the accumulation type, rows packed.
template <class S>
void widen_rows(const S* from, int64_t stride, int64_t rows, int64_t width, acc_t<S>* to) {
  using V = Vec<acc_t<S>>;
  for (int64_t r = 0; r < rows; r++)
    for_each_vec<V>(
        width, [&](int64_t j, auto part) { store(load<V>(from + r * stride + j, part), to + r * width + j, part); });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
