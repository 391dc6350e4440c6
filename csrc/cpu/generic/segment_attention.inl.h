// Graph attention over compressed rows: out[i] = sum_e softmax(scale q[i] . k[index[e]] + bias[e]) v[index[e]].
//
// A row owns its result and walks over its edges in chunks of kSegmentChunk; a near row is gathered once for all heads,
// fetched some edges ahead, and a vector holds the numbers of several heads of as many edges as it has room for: most
// nodes have fewer edges than a vector has lanes. Forward: softmax with a running maximum. Backward
// computes the weights again from the saved maximum and sum, along the nodes for dquery and dbias, along the sources
// for dkey and dvalue. Bytes gathered an edge: forward s NH (D + V), backward twice that. Sums in the accumulation
// type.
#include "cpu/generic/segment_attention_rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

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

// One chunk of one group of heads: weights from products, the running maxima and sums, and what former sums are
// multiplied by.
template <class A>
MK_INLINE void weigh(A* scores, const A* bias, int64_t count, Vec<A> scale, const Room<A>& room, int64_t lane) {
  using V = Vec<A>;
  const V lowest = V::set1(A(-__builtin_inf())), top = V::load(room.top + lane), total = V::load(room.total + lane);
  V most = top;
  for_each_vec<V>(count * room.group, [&](int64_t i, auto part) {
    const V score = score_of(scores, bias, i, scale, part);
    store(score, scores + i, part);
    most = in_part(max(most, score), most, part);
  });
  most = over_edges(most, room.group, [](V x, V y) { return max(x, y); });
  const V shift = select(most == lowest, V::zero(), most);
  V sum = V::zero();
  for_each_vec<V>(count * room.group, [&](int64_t i, auto part) {
    const V w = exp(load<V>(scores + i, part) - shift);
    store(w, scores + i, part);
    sum = sum + in_part(w, V::zero(), part);
  });
  sum = over_edges(sum, room.group, [](V x, V y) { return x + y; });
  const V keep = select(total == V::zero(), V::zero(), exp(top - shift));
  keep.store(room.keep + lane), most.store(room.top + lane), (total * keep + sum).store(room.total + lane);
}

// sums = keep * sums; what is multiplied by 0 is not looked at: it may be NaN.
template <class A>
MK_INLINE void shrink(A keep, int64_t padded, A* sums) {
  using V = Vec<A>;
  for (int64_t i = 0; i < padded; i += V::kLanes)
    (keep == 0 ? V::zero() : V::load(sums + i) * V::set1(keep)).store(sums + i);
}

template <class S>
MK_INLINE void forward_edges(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot,
                             const Room<acc_t<S>>& room) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  const SegmentSide& side = a.side;
  const int64_t padded = segment_padded(side.near_right.width), group = room.group;
  ForwardSlot<S> to(a, slot);
  Chunk<S> chunk;
  const V scale = V::set1(A(a.scale)), lowest = V::set1(A(-__builtin_inf()));
  alignas(64) A bias[kSegmentChunk * V::kLanes];
  for (int64_t i = 0; i < a.heads * padded; i += L) V::zero().store(to.sums + i);
  for (int64_t g = 0; g * room.group < a.heads; g++)
    lowest.store(room.top + g * L), V::zero().store(room.total + g * L);
  for (int64_t h = 0; h < a.heads; h++)
    copy_row<S>(side.own_left, row, h, room.left + h * segment_padded(side.own_left.width));
  for (int64_t begin = first; begin < last; begin += kSegmentChunk) {
    gather<S>(a, begin, last, chunk);
    products<S>(a, side.near_left, room.left, chunk.left, chunk.count, room, room.scores);
    for (int64_t h = 0; h < a.heads; h += group) {
      if (a.bias) gather_bias<S>(a, begin, chunk.count, h, group, bias);
      weigh(room.scores + room.head(h), a.bias ? bias : nullptr, chunk.count, scale, room, room.lane(h));
    }
    for (int64_t h = 0; begin != first && h < a.heads; h++)
      if (const A keep = room.keep[room.lane(h)]; keep != 1) shrink(keep, padded, to.sums + h * padded);
    add_rows<S>(a, side.near_right, room, room.scores, chunk.right, chunk.count, to.sums);
  }
  for (int64_t h = 0; h < a.heads; h++) to.top[h] = room.top[room.lane(h)], to.total[h] = room.total[room.lane(h)];
}

template <class S>
void forward_run(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot, void* scratch) {
  const Room<acc_t<S>> room(a, scratch);
  room.clear();
  forward_edges<S>(a, row, first, last, slot, room);
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
  acc_t<S>* slot = static_cast<acc_t<S>*>(scratch);
  const Room<acc_t<S>> room(a, slot + segment_slot(a));
  room.clear();
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = a.side.ptr[row], last = a.side.ptr[row + 1];
    if (last - first > kSegmentRun) continue;
    forward_edges<S>(a, row, first, last, slot, room);
    forward_join<S>(a, row, slot, 1);
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
  const int64_t heads = segment_heads(a.heads);
  A* numbers = static_cast<A*>(a.numbers) + node * 3 * heads + h;
  numbers[0] = total == 0 ? A(__builtin_inf()) : top;
  numbers[heads] = total == 0 ? A(0) : A(1) / total;
  numbers[2 * heads] = delta;
}

template <class S>
void prepare(const SegmentArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<S>;
  const int64_t heads = segment_heads(a.heads);
  for (int64_t node = begin; node < end; node++) {
    A* numbers = static_cast<A*>(a.numbers) + node * 3 * heads;
    for (int64_t h = 0; h < a.heads; h++) prepare_of<S>(a, node, h);
    for (int64_t h = a.heads; h < heads; h++) numbers[h] = numbers[heads + h] = numbers[2 * heads + h] = 0;
  }
}

// Of one chunk and one group of heads from `begin` on: products become weights, products of dout and value the
// gradients of the scores.
template <class S>
MK_INLINE void differentiate(const SegmentArgs& a, int64_t row, const Chunk<S>& chunk, int64_t begin, int64_t group,
                             const acc_t<S>* bias, acc_t<S>* scores, acc_t<S>* dscores) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t heads = segment_heads(a.heads), n = chunk.count * group;
  const A* numbers = static_cast<const A*>(a.numbers) + begin;
  const V scale = V::set1(A(a.scale));
  const auto apply = [&](int64_t i, auto part, V base, V unit, V delta) {
    const V weight = exp(score_of(scores, bias, i, scale, part) - base) * unit;
    const V gradient = weight * (load<V>(dscores + i, part) - delta);
    store(weight, scores + i, part);
    store(select(weight == V::zero(), V::zero(), gradient), dscores + i, part);
  };
  if (!a.side.numbers_near) {
    const A* mine = numbers + row * 3 * heads;
    const V base = repeated(mine, group), unit = repeated(mine + heads, group),
            delta = repeated(mine + 2 * heads, group);
    for_each_vec<V>(n, [&](int64_t i, auto part) { apply(i, part, base, unit, delta); });
    return;
  }
  alignas(64) A base[kSegmentChunk * V::kLanes], unit[kSegmentChunk * V::kLanes], delta[kSegmentChunk * V::kLanes];
  for (int64_t e = 0; e < chunk.count; e++) {
    const A* theirs = numbers + a.side.near[chunk.first + e] * 3 * heads;
    copy_group(theirs, group, base + e * group), copy_group(theirs + heads, group, unit + e * group);
    copy_group(theirs + 2 * heads, group, delta + e * group);
  }
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    apply(i, part, load<V>(base + i, part), load<V>(unit + i, part), load<V>(delta + i, part));
  });
}

template <class S>
MK_INLINE void backward_edges(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot,
                              const Room<acc_t<S>>& room) {
  using A = acc_t<S>;
  const SegmentSide& side = a.side;
  const int64_t padded = segment_padded(side.own_left.width), value_padded = segment_padded(side.near_right.width);
  A *left = static_cast<A*>(slot), *right = left + a.heads * padded;
  const bool has_dout = side.near_right.data && side.own_right.data;
  const int64_t group = room.group;
  alignas(64) A bias[kSegmentChunk * Vec<A>::kLanes];
  Chunk<S> chunk;
  for (int64_t i = 0; i < a.heads * (padded + value_padded); i += Vec<A>::kLanes) Vec<A>::zero().store(left + i);
  for (int64_t h = 0; h < a.heads; h++) {
    copy_row<S>(side.own_left, row, h, room.left + h * padded);
    if (has_dout) copy_row<S>(side.own_right, row, h, room.right + h * value_padded);
  }
  for (int64_t begin = first; begin < last; begin += kSegmentChunk) {
    gather<S>(a, begin, last, chunk);
    products<S>(a, side.near_left, room.left, chunk.left, chunk.count, room, room.scores);
    if (has_dout)
      products<S>(a, side.near_right, room.right, chunk.right, chunk.count, room, room.dscores);
    else
      for (int64_t i = 0; i < segment_heads(a.heads) * kSegmentChunk; i++) room.dscores[i] = 0;
    for (int64_t h = 0; h < a.heads; h += group) {
      A *scores = room.scores + room.head(h), *dscores = room.dscores + room.head(h);
      if (a.bias) gather_bias<S>(a, begin, chunk.count, h, group, bias);
      differentiate<S>(a, row, chunk, h, group, a.bias ? bias : nullptr, scores, dscores);
    }
    if (side.dbias) {
      S* to = static_cast<S*>(side.dbias) + begin * a.heads;
      for (int64_t h = 0; h < a.heads; h++)
        for (int64_t e = 0; e < chunk.count; e++)
          to[e * a.heads + h] = convert<S>::from(room.dscores[room.head(h) + e * group]);
    }
    if (side.dleft) add_rows<S>(a, side.near_left, room, room.dscores, chunk.left, chunk.count, left);
    if (side.dright && has_dout) add_rows<S>(a, side.near_right, room, room.scores, chunk.right, chunk.count, right);
  }
}

template <class S>
void backward_run(const SegmentArgs& a, int64_t row, int64_t first, int64_t last, void* slot, void* scratch) {
  const Room<acc_t<S>> room(a, scratch);
  room.clear();
  backward_edges<S>(a, row, first, last, slot, room);
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
  acc_t<S>* slot = static_cast<acc_t<S>*>(scratch);
  const Room<acc_t<S>> room(a, slot + segment_slot(a));
  room.clear();
  for (int64_t row = begin; row < end; row++) {
    const int64_t first = a.side.ptr[row], last = a.side.ptr[row + 1];
    if (last - first > kSegmentRun) continue;
    backward_edges<S>(a, row, first, last, slot, room);
    backward_join<S>(a, row, slot, 1);
  }
}

}  // namespace

const SegmentAttentionKernels segment_attention = {MK_FLOAT_TYPES(forward),      MK_FLOAT_TYPES(backward),
                                                   MK_FLOAT_TYPES(forward_run),  MK_FLOAT_TYPES(backward_run),
                                                   MK_FLOAT_TYPES(forward_join), MK_FLOAT_TYPES(backward_join),
                                                   MK_FLOAT_TYPES(prepare)};

}  // namespace mk::cpu::MK_LEVEL
