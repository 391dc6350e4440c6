// What both directions of segment_attention do with the rows that edges lead to: gather a chunk of them, products with
// the own row, weighted sums; and the scores with their bias.
#include <cstring>

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

// Heads of one vector of numbers: a power of two. Edge e, head h of group g: [g][e][h - g size].
template <class A>
MK_INLINE int64_t group_of(int64_t heads) {
  int64_t size = 1;
  while (size < heads && size < Vec<A>::kLanes) size *= 2;
  return size;
}

// Scratch of a run: the own rows of all heads, numbers of the edges of a chunk in groups of heads, products before they
// are added up, and of each group a vector of maxima, of sums and of factors, repeated along its lanes.
template <class A>
struct Room {
  int64_t group;
  A *left, *right, *scores, *dscores, *lanes, *top, *total, *keep;
  Room(const SegmentArgs& a, void* scratch)
      : group(group_of<A>(a.heads)),
        left(static_cast<A*>(scratch)),
        right(left + a.heads * segment_padded(a.side.own_left.width)),
        scores(right + a.heads * segment_padded(a.side.near_right.width)),
        dscores(scores + segment_heads(a.heads) * kSegmentChunk),
        lanes(dscores + segment_heads(a.heads) * kSegmentChunk),
        top(lanes + kSegmentLanes),
        total(top + segment_padded(a.heads)),
        keep(total + segment_padded(a.heads)) {}
  // What lies in idle lanes is then always a number of some edge and head, and costs no time.
  MK_INLINE void clear() const {
    for (int64_t i = 0; i < kSegmentLanes; i += Vec<A>::kLanes) Vec<A>::zero().store(lanes + i);
  }
  // Of numbers, where those of head h begin; the edges lie `group` apart.
  MK_INLINE int64_t head(int64_t h) const { return h / group * group * kSegmentChunk + h % group; }
  // Of maxima, sums and factors.
  MK_INLINE int64_t lane(int64_t h) const { return h / group * Vec<A>::kLanes + h % group; }
};

// The `n` numbers of a group, a power of two.
template <class A>
MK_INLINE void copy_group(const A* from, int64_t n, A* to) {
  switch (n) {
    case 1:
      to[0] = from[0];
      return;
    case 2:
      std::memcpy(to, from, 2 * sizeof(A));
      return;
    case 4:
      std::memcpy(to, from, 4 * sizeof(A));
      return;
    case 8:
      std::memcpy(to, from, 8 * sizeof(A));
      return;
    default:
      std::memcpy(to, from, 16 * sizeof(A));
  }
}

// Those numbers, repeated along a vector.
template <class A>
MK_INLINE Vec<A> repeated(const A* from, int64_t n) {
  alignas(64) A to[Vec<A>::kLanes];
  for (int64_t i = 0; i < Vec<A>::kLanes; i += n) copy_group(from, n, to + i);
  return Vec<A>::load(to);
}

// Lane i = lane i + n, around.
#if defined(__AVX512F__)
MK_INLINE Vec<float> rotated(Vec<float> x, int64_t n) {
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_add_epi32(i, _mm512_set1_epi32(int(n))), x.v)};
}
#endif
template <class V>
MK_INLINE V rotated(V x, int64_t n) {
  alignas(64) typename V::T twice[2 * V::kLanes];
  x.store(twice), x.store(twice + V::kLanes);
  return V::load(twice + n);
}

// The lanes of each head joined, in all of them.
template <class V, class Join>
MK_INLINE V over_edges(V x, int64_t group, const Join& join) {
  for (int64_t step = group; step < V::kLanes; step *= 2) x = join(x, rotated(x, step));
  return x;
}

// out = own[h] . row e for all edges and heads, edge by edge: a row is read at once.
template <class S>
MK_INLINE void products(const SegmentArgs& a, const SegmentTensor& near, const acc_t<S>* own, const S* const* rows,
                        int64_t count, const Room<acc_t<S>>& room, acc_t<S>* out) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const int64_t width = near.width, padded = segment_padded(width), group = room.group, edges = L / group;
  const auto all = [&](const auto& dot) {
    for (int64_t begin = 0; begin < a.heads; begin += group) {
      const int64_t heads = a.heads - begin < group ? a.heads - begin : group;
      for (int64_t first = 0; first < count; first += edges) {
        const int64_t n = count - first < edges ? count - first : edges;
        for (int64_t i = 0; i < n; i++) {
          const S* row = rows[first + i] + begin * near.h;
          for (int64_t h = 0; h < heads; h++)
            dot(own + (begin + h) * padded, row + h * near.h).store(room.lanes + (i * group + h) * L);
        }
        reduce_add_each(room.lanes).store(out + begin * kSegmentChunk + first * group);
      }
    }
  };
  if (width == L)
    all([&](const acc_t<S>* x, const S* row) { return V::load(x) * V::load(row); });
  else if (width < L)
    all([&](const acc_t<S>* x, const S* row) { return V::load(x, width) * V::load(row, width); });
  else
    all([&](const acc_t<S>* x, const S* row) {
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
MK_INLINE void add_wide(const acc_t<S>* weight, int64_t step, const S* const* rows, int64_t offset, int64_t count,
                        int64_t width, acc_t<S>* sum) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const auto columns = [&](int64_t i, auto part, auto vectors) {
    constexpr int N = decltype(vectors)::value;
    V total[N];
    for (int n = 0; n < N; n++) total[n] = load<V>(sum + i + n * L, part);
    for (int64_t e = 0; e < count; e++) {
      const acc_t<S> one = weight[e * step];
      if (one == 0) continue;
      const V w = V::set1(one);
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
MK_INLINE void add_narrow(const SegmentTensor& near, const acc_t<S>* weight, int64_t step, const S* const* rows,
                          int64_t begin, int64_t count, acc_t<S>* sums, Part part) {
  using V = Vec<acc_t<S>>;
  const int64_t padded = segment_padded(near.width);
  V total[N];
  for (int h = 0; h < N; h++) total[h] = load<V>(sums + (begin + h) * padded, part);
  for (int64_t e = 0; e < count; e++) {
    const S* row = rows[e] + begin * near.h;
    for (int h = 0; h < N; h++) {
      const acc_t<S> w = weight[e * step + h];
      if (w != 0) total[h] = fma(V::set1(w), load<V>(row + h * near.h, part), total[h]);
    }
  }
  for (int h = 0; h < N; h++) store(total[h], sums + (begin + h) * padded, part);
}

// sums[h] += sum_e weight of e and h, row e, for all heads.
template <class S>
MK_INLINE void add_rows(const SegmentArgs& a, const SegmentTensor& near, const Room<acc_t<S>>& room,
                        const acc_t<S>* weight, const S* const* rows, int64_t count, acc_t<S>* sums) {
  constexpr int64_t L = Vec<acc_t<S>>::kLanes;
  const int64_t step = room.group;
  int64_t h = 0;
  const auto narrow = [&](auto part) {
    for (; h + 4 <= a.heads; h += 4) add_narrow<S, 4>(near, weight + room.head(h), step, rows, h, count, sums, part);
  };
  if (step >= 4 && near.width == L)
    narrow(Full{});
  else if (step >= 4 && near.width < L)
    narrow(Tail{near.width});
  for (; h < a.heads; h++)
    add_wide<S>(weight + room.head(h), step, rows, h * near.h, count, near.width,
                sums + h * segment_padded(near.width));
}

// The bias of a chunk's edges for the heads from `begin` on, in their places; one of an idle lane is 0.
template <class S>
MK_INLINE void gather_bias(const SegmentArgs& a, int64_t first, int64_t count, int64_t begin, int64_t group,
                           acc_t<S>* bias) {
  const int64_t heads = a.heads - begin < group ? a.heads - begin : group;
  const int64_t* edge = a.side.edge;
  for (int64_t e = 0; e < count; e++) {
    const S* from = static_cast<const S*>(a.bias) + (edge ? edge[first + e] : first + e) * a.bias_e + begin;
    for (int64_t h = 0; h < group; h++) bias[e * group + h] = h < heads ? acc_t<S>(to_float(from[h])) : acc_t<S>(0);
  }
}

// A score from its product; -inf where the bias (null: none) takes the edge away.
template <class A, class Part>
MK_INLINE Vec<A> score_of(const A* product, const A* bias, int64_t i, Vec<A> scale, Part part) {
  using V = Vec<A>;
  const V lowest = V::set1(A(-__builtin_inf())), score = load<V>(product + i, part) * scale;
  if (!bias) return score;
  const V b = load<V>(bias + i, part);
  return select(b == lowest, lowest, score + b);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
