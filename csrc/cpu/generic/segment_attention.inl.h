// Graph attention over compressed rows: out[i] = sum_e softmax(scale q[i] . k[index[e]] + bias[e]) v[index[e]].
//
// A row owns its result and walks over its edges in chunks of kChunk, all heads of a chunk after each other: a near row
// is gathered once for all heads, fetched some edges ahead. Forward: softmax with a running maximum. Backward computes
// the weights again from the saved maximum and sum, along the nodes for dquery and dbias, along the sources for dkey
// and dvalue. Bytes gathered an edge: forward s NH (D + V), backward twice that. Sums in the accumulation type.
#include "cpu/segment_attention.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kChunk = 64;  // a multiple of every vector length

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
  const S *left[kChunk], *right[kChunk];
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
  chunk.first = first, chunk.count = last - first < kChunk ? last - first : kChunk;
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

// out[e] = own . rows[e], offset elements into the row.
template <class S>
MK_INLINE void products(const acc_t<S>* own, const S* const* rows, int64_t offset, int64_t count, int64_t width,
                        acc_t<S>* out) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  alignas(64) acc_t<S> lanes[L * L];
  const auto groups = [&](const auto& dot) {
    for (int64_t first = 0; first < count; first += L) {
      const int64_t n = count - first < L ? count - first : L;
      for (int64_t i = 0; i < n; i++) dot(rows[first + i] + offset).store(lanes + i * L);
      for (int64_t i = n; i < L; i++) V::zero().store(lanes + i * L);
      reduce_add_each(lanes).store(out + first);
    }
  };
  if (width == L) {
    const V x = V::load(own);
    groups([&](const S* row) { return x * V::load(row); });
  } else if (width < L) {
    const V x = V::load(own, width);
    groups([&](const S* row) { return x * V::load(row, width); });
  } else {
    groups([&](const S* row) {
      V sum = V::zero();
      for_each_vec<V>(width,
                      [&](int64_t i, auto part) { sum = fma(load<V>(own + i, part), load<V>(row + i, part), sum); });
      return sum;
    });
  }
}

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// sum = keep * sum + sum_e weight[e] rows[e]; what is multiplied by 0 is not looked at: it may be NaN.
template <class S>
MK_INLINE void add_rows(const acc_t<S>* weight, const S* const* rows, int64_t offset, int64_t count, int64_t width,
                        acc_t<S> keep, acc_t<S>* sum) {
  using V = Vec<acc_t<S>>;
  constexpr int64_t L = V::kLanes;
  const auto columns = [&](int64_t i, auto part, auto vectors) {
    constexpr int N = decltype(vectors)::value;
    V total[N];
    for (int n = 0; n < N; n++) total[n] = keep == 0 ? V::zero() : load<V>(sum + i + n * L, part) * V::set1(keep);
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

// Scores of one head from their products, in place; -inf where the bias takes the edge away.
template <class S>
MK_INLINE void add_bias(const SegmentArgs& a, int64_t first, int64_t count, int64_t h, acc_t<S>* scores) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const V scale = V::set1(A(a.scale));
  alignas(64) A bias[kChunk];
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

// ---- forward: a slot is sums [NH][Vp], maxima [NH], sums of weights [NH]

template <class S>
struct ForwardSlot {
  using A = acc_t<S>;
  A *sums, *top, *total;
  ForwardSlot(const SegmentArgs& a, void* slot)
      : sums(static_cast<A*>(slot)),
        top(sums + a.heads * segment_padded(a.side.near_right.width)),
        total(top + a.heads) {}
};

// One chunk of one head: weights from scores, the running maximum and sum; returns what former sums are multiplied by.
template <class A>
MK_INLINE A weigh(A* scores, int64_t count, A& top, A& total) {
  using V = Vec<A>;
  const A infinity = A(__builtin_inf());
  V most = V::set1(top);
  for_each_vec<V>(count,
                  [&](int64_t i, auto part) { most = in_part(max(most, load<V>(scores + i, part)), most, part); });
  const A new_top = reduce_max(most), shift = new_top == -infinity ? A(0) : new_top;
  V sum = V::zero();
  for_each_vec<V>(count, [&](int64_t i, auto part) {
    const V w = exp(load<V>(scores + i, part) - V::set1(shift));
    store(w, scores + i, part);
    sum = sum + in_part(w, V::zero(), part);
  });
  A keep = 0;
  if (total != 0) {
    alignas(64) A factor[V::kLanes];
    exp(V::set1(top - shift)).store(factor);
    keep = factor[0];
  }
  total = total * keep + reduce_add(sum), top = new_top;
  return keep;
}

template <class S>
void forward_run(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot, void* scratch) {
  using A = acc_t<S>;
  const int64_t width = a.side.near_right.width, padded = segment_padded(width);
  ForwardSlot<S> to(a, slot);
  A* own = static_cast<A*>(scratch);
  alignas(64) A scores[kChunk];
  Chunk<S> chunk;
  for (int64_t i = 0; i < a.heads * padded; i++) to.sums[i] = 0;
  for (int64_t h = 0; h < a.heads; h++) to.top[h] = A(-__builtin_inf()), to.total[h] = 0;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    gather<S>(a, begin, last, chunk);
    for (int64_t h = 0; h < a.heads; h++) {
      copy_row<S>(a.side.own_left, row, h, own);
      products<S>(own, chunk.left, h * a.side.near_left.h, chunk.count, a.side.near_left.width, scores);
      add_bias<S>(a, begin, chunk.count, h, scores);
      const A keep = weigh(scores, chunk.count, to.top[h], to.total[h]);
      add_rows<S>(scores, chunk.right, h * a.side.near_right.h, chunk.count, width, keep, to.sums + h * padded);
    }
  }
}

// Joins the maxima, sums of weights and sums of `count` slots into the first one.
template <class S>
MK_INLINE void join_slots(const SegmentArgs& a, void* slots, int64_t count) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t padded = segment_padded(a.side.near_right.width), step = segment_slot(a);
  ForwardSlot<S> to(a, slots);
  for (int64_t h = 0; h < a.heads; h++)
    for (int64_t s = 1; s < count; s++) {
      ForwardSlot<S> from(a, static_cast<A*>(slots) + s * step);
      const A top = to.top[h] < from.top[h] ? from.top[h] : to.top[h];
      const A shift = top == A(-__builtin_inf()) ? A(0) : top;
      const V keep = exp(V::set1(to.top[h] - shift)), take = exp(V::set1(from.top[h] - shift));
      alignas(64) A factors[2 * V::kLanes];
      keep.store(factors), take.store(factors + V::kLanes);
      A *sum = to.sums + h * padded, *other = from.sums + h * padded;
      for (int64_t i = 0; i < padded; i += V::kLanes) {
        const V before = factors[0] == 0 ? V::zero() : V::load(sum + i) * keep;
        (factors[V::kLanes] == 0 ? before : fma(V::load(other + i), take, before)).store(sum + i);
      }
      to.total[h] = to.total[h] * factors[0] + from.total[h] * factors[V::kLanes], to.top[h] = top;
    }
}

template <class S>
void forward_join(const SegmentArgs& a, int64_t row, void* slots, int64_t count) {
  using A = acc_t<S>;
  using V = Vec<A>;
  join_slots<S>(a, slots, count);
  ForwardSlot<S> from(a, slots);
  const int64_t width = a.side.near_right.width, padded = segment_padded(width);
  A *lse = static_cast<A*>(a.lse) + row * a.heads, *stats = static_cast<A*>(a.stats) + row * a.heads * 2;
  for (int64_t h = 0; h < a.heads; h++) {
    const A total = from.total[h];
    const V divisor = V::set1(total == 0 ? A(1) : total);
    S* out = static_cast<S*>(a.out) + (row * a.heads + h) * width;
    A* exact = a.exact ? static_cast<A*>(a.exact) + (row * a.heads + h) * width : nullptr;
    for_each_vec<V>(width, [&](int64_t i, auto part) {
      const V value = load<V>(from.sums + h * padded + i, part) / divisor;
      store(value, out + i, part);
      if (exact) store(value, exact + i, part);
    });
    stats[2 * h] = from.top[h], stats[2 * h + 1] = total;
  }
  for_each_vec<V>(a.heads, [&](int64_t i, auto part) {
    store(load<V>(from.top + i, part) + log(load<V>(from.total + i, part)), lse + i, part);
  });
}

template <class S>
void forward(const SegmentArgs& a, int64_t begin, int64_t end, void* scratch) {
  acc_t<S>* room = static_cast<acc_t<S>*>(scratch);
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = a.side.ptr[row], last = a.side.ptr[row + 1];
    if (last - first > kSegmentRun) continue;
    forward_run<S>(a, row, first, last, room, room + segment_slot(a));
    forward_join<S>(a, row, room, 1);
  }
}

// ---- backward: a slot is gradients of the left parts [NH][Dp], then of the right ones [NH][Vp]

template <class S>
MK_INLINE void prepare_of(const SegmentArgs& a, int64_t node, int64_t h) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t width = a.dout.width, at = node * a.heads + h;
  A delta = 0;
  if (a.dout.data) {
    V sum = V::zero();
    const S* dout = part_of<S>(a.dout, node, h);
    const auto dot = [&](const auto* out) {
      for_each_vec<V>(width,
                      [&](int64_t i, auto part) { sum = fma(load<V>(dout + i, part), load<V>(out + i, part), sum); });
    };
    a.saved_exact ? dot(static_cast<const A*>(a.saved_out) + at * width)
                  : dot(static_cast<const S*>(a.saved_out) + at * width);
    // Added up as dout . value is in backward, so that at a node with one edge the two cancel to nothing.
    alignas(64) A lanes[V::kLanes * V::kLanes], sums[V::kLanes];
    for (int64_t i = 0; i < V::kLanes; i++) V::zero().store(lanes + i * V::kLanes);
    sum.store(lanes);
    reduce_add_each(lanes).store(sums);
    delta = sums[0];
  }
  if (a.dlse.data) delta -= part_of<A>(a.dlse, node, 0)[h * a.dlse.h];
  const A top = static_cast<const A*>(a.saved_stats)[2 * at], total = static_cast<const A*>(a.saved_stats)[2 * at + 1];
  A* numbers = static_cast<A*>(a.numbers) + node * 3 * a.heads + h;
  numbers[0] = total == 0 ? A(__builtin_inf()) : top;
  numbers[a.heads] = total == 0 ? A(0) : A(1) / total;
  numbers[2 * a.heads] = delta;
}

template <class S>
void prepare(const SegmentArgs& a, int64_t begin, int64_t end) {
  for (int64_t node = begin; node < end; node++)
    for (int64_t h = 0; h < a.heads; h++) prepare_of<S>(a, node, h);
}

// Of one chunk and head: scores become weights, products of dout and value the gradients of the scores.
template <class S>
MK_INLINE void differentiate(const SegmentArgs& a, int64_t row, const Chunk<S>& chunk, int64_t h, acc_t<S>* scores,
                             acc_t<S>* dscores) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const A* numbers = static_cast<const A*>(a.numbers) + h;
  const auto apply = [&](int64_t i, auto part, V base, V unit, V delta) {
    const V weight = exp(load<V>(scores + i, part) - base) * unit;
    const V gradient = weight * (load<V>(dscores + i, part) - delta);
    store(weight, scores + i, part);
    store(select(weight == V::zero(), V::zero(), gradient), dscores + i, part);
  };
  if (!a.side.numbers_near) {
    const A* mine = numbers + row * 3 * a.heads;
    const V base = V::set1(mine[0]), unit = V::set1(mine[a.heads]), delta = V::set1(mine[2 * a.heads]);
    for_each_vec<V>(chunk.count, [&](int64_t i, auto part) { apply(i, part, base, unit, delta); });
    return;
  }
  alignas(64) A base[kChunk], unit[kChunk], delta[kChunk];
  for (int64_t e = 0; e < chunk.count; e++) {
    const A* theirs = numbers + a.side.near[chunk.first + e] * 3 * a.heads;
    base[e] = theirs[0], unit[e] = theirs[a.heads], delta[e] = theirs[2 * a.heads];
  }
  for_each_vec<V>(chunk.count, [&](int64_t i, auto part) {
    apply(i, part, load<V>(base + i, part), load<V>(unit + i, part), load<V>(delta + i, part));
  });
}

template <class S>
void backward_run(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot, void* scratch) {
  using A = acc_t<S>;
  const SegmentSide& side = a.side;
  const int64_t width = side.own_left.width, value_width = side.near_right.width;
  const int64_t padded = segment_padded(width), value_padded = segment_padded(value_width);
  A *left = static_cast<A*>(slot), *right = left + a.heads * padded;
  A *own_left = static_cast<A*>(scratch), *own_right = own_left + padded;
  alignas(64) A scores[kChunk], dscores[kChunk];
  Chunk<S> chunk;
  for (int64_t i = 0; i < a.heads * (padded + value_padded); i++) left[i] = 0;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    gather<S>(a, begin, last, chunk);
    for (int64_t h = 0; h < a.heads; h++) {
      copy_row<S>(side.own_left, row, h, own_left);
      products<S>(own_left, chunk.left, h * side.near_left.h, chunk.count, width, scores);
      add_bias<S>(a, begin, chunk.count, h, scores);
      if (chunk.right[0]) {
        copy_row<S>(side.own_right, row, h, own_right);
        products<S>(own_right, chunk.right, h * side.near_right.h, chunk.count, value_width, dscores);
      } else {
        for (int64_t e = 0; e < kChunk; e++) dscores[e] = 0;
      }
      differentiate<S>(a, row, chunk, h, scores, dscores);
      if (side.dbias) {
        S* to = static_cast<S*>(side.dbias) + begin * a.heads + h;
        for (int64_t e = 0; e < chunk.count; e++) to[e * a.heads] = convert<S>::from(dscores[e]);
      }
      if (side.dleft)
        add_rows<S>(dscores, chunk.left, h * side.near_left.h, chunk.count, width, A(1), left + h * padded);
      if (side.dright && chunk.right[0])
        add_rows<S>(scores, chunk.right, h * side.near_right.h, chunk.count, value_width, A(1),
                    right + h * value_padded);
    }
  }
}

template <class S>
void backward_join(const SegmentArgs& a, int64_t row, void* slots, int64_t count) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t step = segment_slot(a);
  const auto write = [&](const A* sums, int64_t width, A factor, void* gradient) {
    if (!gradient) return;
    for (int64_t h = 0; h < a.heads; h++) {
      S* to = static_cast<S*>(gradient) + (row * a.heads + h) * width;
      for_each_vec<V>(width, [&](int64_t i, auto part) {
        const A* from = sums + h * segment_padded(width) + i;
        V sum = load<V>(from, part);
        for (int64_t s = 1; s < count; s++) sum = sum + load<V>(from + s * step, part);
        store(sum * V::set1(factor), to + i, part);
      });
    }
  };
  const A* sums = static_cast<const A*>(slots);
  write(sums, a.side.own_left.width, A(a.scale), a.side.dleft);
  write(sums + a.heads * segment_padded(a.side.own_left.width), a.side.near_right.width, A(1), a.side.dright);
}

template <class S>
void backward(const SegmentArgs& a, int64_t begin, int64_t end, void* scratch) {
  acc_t<S>* room = static_cast<acc_t<S>*>(scratch);
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = a.side.ptr[row], last = a.side.ptr[row + 1];
    if (last - first > kSegmentRun) continue;
    backward_run<S>(a, row, first, last, room, room + segment_slot(a));
    backward_join<S>(a, row, room, 1);
  }
}

}  // namespace

const SegmentAttentionKernels segment_attention = {MK_FLOAT_TYPES(forward),      MK_FLOAT_TYPES(backward),
                                                   MK_FLOAT_TYPES(forward_run),  MK_FLOAT_TYPES(backward_run),
                                                   MK_FLOAT_TYPES(forward_join), MK_FLOAT_TYPES(backward_join),
                                                   MK_FLOAT_TYPES(prepare)};

}  // namespace mk::cpu::MK_LEVEL
