// What both directions of segment_attention do with the rows that edges lead to: gather a chunk of them, products with
// the own row, weighted sums; and the scores with their bias.
#include "cpu/segment_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class S>
MK_INLINE const S* part_of(const SegmentTensor& t, int64_t row, int64_t h) {
  return static_cast<const S*>(t.data) + row * t.row + h * t.h;
}

template <class S>
MK_INLINE void copy_row(const SegmentTensor& t, int64_t row, int64_t h, acc_t<S>* to) {
  using V = Vec<acc_t<S>>;
  const S* from = part_of<S>(t, row, h);
  for_each_vec<V>(t.width, [&](int64_t i, auto part) { store(load<V>(from + i, part), to + i, part); });
}

// The near rows of a chunk of edges.
template <class S>
struct Chunk {
  int64_t first, count;
  const S *left[kSegmentChunk], *right[kSegmentChunk];
};

template <class S>
MK_INLINE void fetch_row(const SegmentTensor& t, int64_t row, int64_t heads) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(S));
  const bool dense = t.h == t.width;
  const int64_t width = dense ? heads * t.width : t.width;
  for (int64_t h = 0; h < (dense ? 1 : heads); h++) {
    const S* data = part_of<S>(t, row, h);
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(data + i, 0, 2);
  }
}

template <class S>
MK_INLINE void gather(const SegmentArgs& a, int64_t first, int64_t last, Chunk<S>& chunk) {
  const SegmentSide& side = a.side;
  // As many edges ahead as keep some 8 kB under way, which is less than the nearest cache holds.
  const int64_t bytes = a.heads * (side.near_left.width + side.near_right.width) * int64_t(sizeof(S));
  const int64_t ahead = bytes > 4096 ? 2 : bytes > 512 ? 8 : 16;
  chunk.first = first, chunk.count = last - first < kSegmentChunk ? last - first : kSegmentChunk;
  for (int64_t e = 0; e < chunk.count; e++) {
    const int64_t row = side.near[first + e], next = first + e + ahead;
    if (next < side.edges) {
      fetch_row<S>(side.near_left, side.near[next], a.heads);
      if (side.near_right.data) fetch_row<S>(side.near_right, side.near[next], a.heads);
    }
    chunk.left[e] = part_of<S>(side.near_left, row, 0);
    chunk.right[e] = side.near_right.data ? part_of<S>(side.near_right, row, 0) : nullptr;
  }
}

// Scratch of a run: the own rows of all heads, numbers "NH kSegmentChunk" of the edges of a chunk, and products before
// they are added up, which are always finite numbers of some edge: what lies in idle lanes costs no time.
template <class A>
struct Room {
  A *left, *right, *scores, *dscores, *lanes;
  Room(const SegmentArgs& a, void* scratch)
      : left(static_cast<A*>(scratch)),
        right(left + a.heads * segment_padded(a.side.own_left.width)),
        scores(right + a.heads * segment_padded(a.side.near_right.width)),
        dscores(scores + a.heads * kSegmentChunk),
        lanes(dscores + a.heads * kSegmentChunk) {}
  MK_INLINE void clear() const {
    for (int64_t i = 0; i < kSegmentLanes; i += Vec<A>::kLanes) Vec<A>::zero().store(lanes + i);
  }
};

// out[h][e] = own[h] . row e, for all heads. Narrow rows edge by edge, so that one row is read at once and one loop of
// unknown length is left; wide ones head by head. Either way a product is added up in the same order.
template <class S>
MK_INLINE void products(const SegmentArgs& a, const SegmentTensor& near, const acc_t<S>* own, const S* const* rows,
                        int64_t count, acc_t<S>* out, acc_t<S>* lanes) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const int64_t width = near.width, padded = segment_padded(width);
  const auto of_heads = [&](int64_t begin, int64_t heads, const auto& dot) {
    for (int64_t first = 0; first < count; first += L) {
      const int64_t n = count - first < L ? count - first : L;
      for (int64_t i = 0; i < n; i++) {
        const S* row = rows[first + i] + begin * near.h;
        for (int64_t h = 0; h < heads; h++)
          dot(own + (begin + h) * padded, row + h * near.h).store(lanes + (h * L + i) * L);
      }
      for (int64_t h = 0; h < heads; h++)
        reduce_add_each(lanes + h * L * L).store(out + (begin + h) * kSegmentChunk + first);
    }
  };
  const auto all = [&](int64_t step, const auto& dot) {
    for (int64_t h = 0; h < a.heads; h += step) of_heads(h, a.heads - h < step ? a.heads - h : step, dot);
  };
  constexpr int64_t kTogether = kSegmentLanes / (L * L) < 4 ? kSegmentLanes / (L * L) : 4;
  if (width == L)
    all(kTogether, [&](const acc_t<S>* x, const S* row) { return V::load(x) * V::load(row); });
  else if (width < L)
    all(kTogether, [&](const acc_t<S>* x, const S* row) { return V::load(x, width) * V::load(row, width); });
  else
    all(width <= 2 * L ? kTogether : 1, [&](const acc_t<S>* x, const S* row) {
      V sum = V::zero();
      for_each_vec<V>(width,
                      [&](int64_t i, auto part) { sum = fma(load<V>(x + i, part), load<V>(row + i, part), sum); });
      return sum;
    });
}

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// sum += sum_e weight[e] row e, of one head; a row of weight 0 is not looked at: it may be NaN.
template <class S>
MK_INLINE void add_wide(const acc_t<S>* weight, const S* const* rows, int64_t offset, int64_t count, int64_t width,
                        acc_t<S>* sum) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const auto columns = [&](int64_t i, auto part, auto vectors) {
    constexpr int N = decltype(vectors)::value;
    V total[N];
    for (int n = 0; n < N; n++) total[n] = load<V>(sum + i + n * L, part);
    for (int64_t e = 0; e < count; e++) {
      if (weight[e] == 0) continue;
      const V w = V::set1(weight[e]);
      for (int n = 0; n < N; n++) total[n] = fma(w, load<V>(rows[e] + offset + i + n * L, part), total[n]);
    }
    for (int n = 0; n < N; n++) store(total[n], sum + i + n * L, part);
  };
  int64_t i = 0;
  for (; i + 4 * L <= width; i += 4 * L) columns(i, Full{}, Vectors<4>{});
  for (; i + L <= width; i += L) columns(i, Full{}, Vectors<1>{});
  if (i < width) columns(i, Tail{width - i}, Vectors<1>{});
}

// N heads of one vector each, whose sums stay in registers.
template <class S, int N, class Part>
MK_INLINE void add_narrow(const SegmentTensor& near, const acc_t<S>* weight, const S* const* rows, int64_t begin,
                          int64_t count, acc_t<S>* sums, Part part) {
  using V = Vec<acc_t<S>>;
  const int64_t padded = segment_padded(near.width);
  V total[N];
  for (int h = 0; h < N; h++) total[h] = load<V>(sums + (begin + h) * padded, part);
  for (int64_t e = 0; e < count; e++) {
    const S* row = rows[e] + begin * near.h;
    for (int h = 0; h < N; h++) {
      const acc_t<S> w = weight[(begin + h) * kSegmentChunk + e];
      if (w != 0) total[h] = fma(V::set1(w), load<V>(row + h * near.h, part), total[h]);
    }
  }
  for (int h = 0; h < N; h++) store(total[h], sums + (begin + h) * padded, part);
}

// sums[h] += sum_e weight[h][e] row e, for all heads.
template <class S>
MK_INLINE void add_rows(const SegmentArgs& a, const SegmentTensor& near, const acc_t<S>* weight, const S* const* rows,
                        int64_t count, acc_t<S>* sums) {
  constexpr int64_t L = Vec<acc_t<S>>::kLanes;
  int64_t h = 0;
  if (near.width == L)
    for (; h + 4 <= a.heads; h += 4) add_narrow<S, 4>(near, weight, rows, h, count, sums, Full{});
  else if (near.width < L)
    for (; h + 4 <= a.heads; h += 4) add_narrow<S, 4>(near, weight, rows, h, count, sums, Tail{near.width});
  for (; h < a.heads; h++)
    add_wide<S>(weight + h * kSegmentChunk, rows, h * near.h, count, near.width, sums + h * segment_padded(near.width));
}

// Scores of one head from their products, in place; -inf where the bias takes the edge away.
template <class S>
MK_INLINE void add_bias(const SegmentArgs& a, int64_t first, int64_t count, int64_t h, acc_t<S>* scores) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const V scale = V::set1(A(a.scale));
  alignas(64) A bias[kSegmentChunk];
  if (a.bias) {
    const S* from = static_cast<const S*>(a.bias) + h;
    const int64_t* edge = a.side.edge;
    for (int64_t e = 0; e < count; e++) bias[e] = to_float(from[(edge ? edge[first + e] : first + e) * a.bias_e]);
  }
  const V lowest = V::set1(A(-__builtin_inf()));
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    V score = load<V>(scores + i, part) * scale;
    if (a.bias) {
      const V b = load<V>(bias + i, part);
      score = select(b == lowest, lowest, score + b);
    }
    store(score, scores + i, part);
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
