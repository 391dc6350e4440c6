// ntm_sequence, all steps of a few batch rows at a time: batch outer, time inner. The memory of a row (transposed,
// ntm_memory.inl.h) stays in the L1 or L2 cache through all steps; the rows of a tile share the reads of the
// controller's weights, which lie in the L2 cache. Forward keeps weights, gates, cells and head vectors of each step:
// O(N + W) a row. Backward replays the writes, which is all it needs to have the memories again: once forward to keep
// one memory a segment of about sqrt(T) steps, then within each segment from the last to the first.
// Precision: the accumulation type throughout, state included; what is public is rounded once.
#include "cpu/generic/ntm_memory.inl.h"
#include "cpu/generic/sequence_controller.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Where the saved outputs of (t, b) lie.
template <class A>
struct NtmPlace {
  A *entered, *next, *gates, *cell, *weights, *heads;
  const A* before;  // weights of the step before, null at the first one
  MK_INLINE NtmPlace(const NtmArgs& a, int64_t t, int64_t b) {
    const int64_t i = t * a.batch + b, each = a.every() * a.rows;
    entered = static_cast<A*>(a.entered) + i * a.depth(), next = entered + a.batch * a.depth();
    gates = static_cast<A*>(a.gates) + i * 4 * a.hidden, cell = static_cast<A*>(a.cells) + i * a.hidden;
    weights = static_cast<A*>(a.weights) + i * each, heads = static_cast<A*>(a.heads) + i * a.head_row();
    before = t ? weights - a.batch * each : nullptr;
  }
};

// A row of weights in the order the parts have in a row of `heads`; body(part, its index in dweight, rows, first).
template <class Body>
void each_projection(const NtmArgs& a, const Body& body) {
  const int64_t sizes[5] = {a.readers * a.width, a.writers * a.width, a.readers * a.scalars, a.writers * a.scalars,
                            2 * a.writers * a.width};
  const void* parts[5] = {a.read_key, a.write_key, a.read_scalars, a.write_scalars, a.write_vectors};
  const int order[5] = {4, 6, 5, 7, 8};
  for (int64_t p = 0, first = 0; p < 5; first += sizes[p], p++) body(parts[p], order[p], sizes[p], first);
}

// The matrices of controller and heads: [K][4H] and [H][P] for forward, [4H][K] and [P][H] for backward.
template <class S>
void ntm_pack(const NtmArgs& a, bool backward) {
  using A = acc_t<S>;
  const int64_t columns = a.projected();
  pack_controller<S>(a, backward);
  each_projection(a, [&](const void* part, int, int64_t rows, int64_t first) {
    pack_matrix<S>(part, a.hidden + 1, rows, a.hidden, a.projection, first, 0, columns, a.hidden, !backward);
    if (backward) return;
    for (int64_t j = 0; j < rows; j++)
      static_cast<A*>(a.projection_bias)[first + j] =
          to_float(static_cast<const S*>(part)[j * (a.hidden + 1) + a.hidden]);
  });
}

// The state of a row before the first step: memory, transposed, and weights [R + U][N].
template <class S>
void ntm_initial_memory(const NtmArgs& a, int64_t b, acc_t<S>* memory, int64_t stride) {
  const S* from = static_cast<const S*>(a.memory) + b * a.memory_b;
  for (int64_t n = 0; n < a.rows; n++)
    for (int64_t w = 0; w < a.width; w++) memory[w * stride + n] = to_float(from[n * a.memory_n + w]);
}
template <class S>
void ntm_initial_weights(const NtmArgs& a, int64_t b, acc_t<S>* weights) {
  const int64_t read = a.readers * a.rows, write = a.writers * a.rows;
  convert_run(static_cast<const S*>(a.read_weights) + b * read, weights, read);
  convert_run(static_cast<const S*>(a.write_weights) + b * write, weights + read, write);
}

// The activations of a row of `heads`, in place.
template <class A>
void ntm_activate(const NtmArgs& a, const NtmHeads<A>& heads, A* room) {
  using V = Vec<A>;
  const int64_t taps = a.scalars - 3;
  for (int64_t h = 0; h < a.every(); h++) {
    A* s = heads.scalars + h * a.scalars;
    V top = V::set1(-A(__builtin_inf())), total = V::zero();
    const V lowest = top;
    for_each_vec<V>(taps,
                    [&](int64_t j, auto part) { top = max(top, in_part(load<V>(s + 3 + j, part), lowest, part)); });
    const V most = V::set1(reduce_max(top));
    for_each_vec<V>(taps, [&](int64_t j, auto part) {
      const V power = exp(load<V>(s + 3 + j, part) - most);
      total = total + in_part(power, V::zero(), part);
      store(power, room + j, part);
    });
    const V share = V::set1(1 / reduce_add(total));
    for_each_vec<V>(taps, [&](int64_t j, auto part) { store(load<V>(room + j, part) * share, s + 3 + j, part); });
    const V raw = V::load(s, 3 < V::kLanes ? 3 : V::kLanes);
    alignas(64) A bent[V::kLanes], gate[V::kLanes];
    if constexpr (V::kLanes > 2) {
      softplus(raw).store(bent), sigmoid(raw).store(gate);
      s[0] = a.graves ? 1 + bent[0] : bent[0], s[1] = gate[1], s[2] = 1 + bent[2];
    } else {
      for (int j = 0; j < 3; j++) {
        (j == 1 ? sigmoid(V::set1(s[j])) : softplus(V::set1(s[j]))).store(bent);
        s[j] = j == 1 || (j == 0 && !a.graves) ? bent[0] : 1 + bent[0];
      }
    }
  }
  const int64_t n = a.writers * a.width;
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    store(sigmoid(load<V>(heads.erase + j, part)), heads.erase + j, part);
    if (a.graves) store(tanh(load<V>(heads.add + j, part)), heads.add + j, part);
  });
}

template <class A>
struct NtmSizes {
  int64_t stride, memory, weights, address, state;
  MK_INLINE explicit NtmSizes(const NtmArgs& a) {
    stride = a.padded_rows(), memory = stride * a.width + 16, weights = a.every() * a.rows + 16;
    address = NtmAddress<A>::size(a), state = a.depth() + 16;
  }
};

int64_t ntm_scratch(const NtmArgs& a, bool backward) {
  const NtmSizes<float> z(a);
  const int64_t forward = kNtmTile * (z.memory + z.weights) + z.address + a.scalars + 16;
  if (!backward) return forward;
  const int64_t segment = ntm_segment(a.steps), kept = (a.steps + segment - 1) / segment + segment + 1;
  return forward + kNtmTile * ((kept + 1) * z.memory + z.weights + 2 * z.state + a.hidden + 16) + 3 * z.weights +
         a.rows + 2 * a.every() * (a.scalars + 4) + 128;
}

template <class S>
void ntm_forward(const NtmArgs& a, int64_t first, int64_t count, void* scratch) {
  using A = acc_t<S>;
  const NtmSizes<A> z(a);
  A *memory = static_cast<A*>(scratch), *initial = memory + kNtmTile * z.memory, *room = initial + kNtmTile * z.weights,
    *small = room + z.address;
  const int64_t gates = 4 * a.hidden, into = a.features + a.read();
  for (int64_t i = 0; i < count; i++) {
    const int64_t b = first + i;
    ntm_initial_memory<S>(a, b, memory + i * z.memory, z.stride);
    ntm_initial_weights<S>(a, b, initial + i * z.weights);
    controller_start<S>(a, b);
  }
  for (int64_t t = 0; t < a.steps; t++) {
    const NtmPlace<A> head(a, t, first);
    for (int64_t i = 0; i < count; i++)
      convert_run(static_cast<const S*>(a.input) + t * a.input_t + (first + i) * a.input_b,
                  NtmPlace<A>(a, t, first + i).entered, a.features);
    times(head.entered, a.depth(), count, a.depth(), static_cast<const A*>(a.controller), gates,
          static_cast<const A*>(a.controller_bias), head.gates, gates);
    for (int64_t i = 0; i < count; i++) controller_forward<S>(a, t, first + i, NtmPlace<A>(a, t, first + i));
    times(head.next + into, a.depth(), count, a.hidden, static_cast<const A*>(a.projection), a.projected(),
          static_cast<const A*>(a.projection_bias), head.heads, a.head_row());
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = first + i;
      const NtmPlace<A> at(a, t, b);
      const NtmHeads<A> heads(a, at.heads);
      A* m = memory + i * z.memory;
      ntm_activate(a, heads, small);
      NtmAddress<A> address(a, room);
      address.weigh(a, m, z.stride, heads);
      LocationAddressArgs l = address.location(a, heads, t ? at.before : initial + i * z.weights);
      l.weights = at.weights;
      for (int64_t h = 0; h < a.every(); h++) location_address_forward<A>(l, 0, h, address.room);
      A* reads = at.next + a.features;
      if (!a.graves) column_read(a, m, z.stride, at.weights, reads);
      column_write(a, m, m, z.stride, at.weights + a.readers * a.rows, heads);
      if (a.graves) column_read(a, m, z.stride, at.weights, reads);
      convert_run(reads, static_cast<S*>(a.all_reads) + (t * a.batch + b) * a.read(), a.read());
    }
  }
  for (int64_t i = 0; i < count; i++) {
    clear(NtmPlace<A>(a, a.steps, first + i).entered, a.features);
    S* last = static_cast<S*>(a.last_memory) + (first + i) * a.rows * a.width;
    for (int64_t n = 0; n < a.rows; n++)
      for (int64_t w = 0; w < a.width; w++)
        last[n * a.width + w] = convert<S>::from(memory[i * z.memory + w * z.stride + n]);
  }
}

// What one row carries from step to step in backward.
template <class A>
struct NtmCarried {
  A *memory, *weights, *entered, *cell;  // gradients: [W][N], [R + U][N], of [x, reads, h], of c
};

// The gradient of a row of `heads` before the activations, from that of the activated ones.
template <class A>
void ntm_slopes(const NtmArgs& a, const NtmHeads<A>& heads, const NtmHeads<A>& d, const A* dgate, const A* dshift,
                const A* dsharpen) {
  using V = Vec<A>;
  const int64_t taps = a.scalars - 3, n = a.writers * a.width;
  for (int64_t h = 0; h < a.every(); h++) {
    const A* s = heads.scalars + h * a.scalars;
    A* to = d.scalars + h * a.scalars;
    // The slope of y = softplus(x) is 1 - exp(-y).
    const A strength = a.graves ? s[0] - 1 : s[0];
    to[0] *= 1 - reduce_max(exp(V::set1(-strength))), to[1] = dgate[h] * s[1] * (1 - s[1]);
    to[2] = dsharpen[h] * (1 - reduce_max(exp(V::set1(1 - s[2]))));
    const V centre = V::set1(dot_of(dshift + h * taps, s + 3, taps));
    for_each_vec<V>(taps, [&](int64_t j, auto part) {
      store(load<V>(s + 3 + j, part) * (load<V>(dshift + h * taps + j, part) - centre), to + 3 + j, part);
    });
  }
  const V one = V::set1(1);
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    const V e = load<V>(heads.erase + j, part), add = load<V>(heads.add + j, part);
    store(load<V>(d.erase + j, part) * e * (one - e), d.erase + j, part);
    if (a.graves) store(load<V>(d.add + j, part) * (one - add * add), d.add + j, part);
  });
}

// Heads and memory of one row at one step: from the carried gradients to those of the step before and of `heads`.
template <class S>
void ntm_heads_backward(const NtmArgs& a, int64_t t, int64_t b, const acc_t<S>* before, const acc_t<S>* after,
                        const acc_t<S>* initial, const NtmCarried<acc_t<S>>& d, acc_t<S>* room) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const NtmSizes<A> z(a);
  const NtmPlace<A> at(a, t, b);
  const NtmHeads<A> heads(a, at.heads), dheads(a, static_cast<A*>(a.dheads) + (t * a.batch + b) * a.head_row());
  A *dcontent = room + z.address, *dprevious = dcontent + z.weights, *shrink = dprevious + z.weights;
  A *dgate = shrink + a.rows + 16, *dsharpen = dgate + a.every() + 16, *dshift = dsharpen + a.every() + 16;
  A* dreads = d.entered + a.features;
  const int64_t place = t * a.batch + b;
  if (a.dreads) {
    const S* more = static_cast<const S*>(a.dreads) + place * a.read();
    for_each_vec<V>(a.read(), [&](int64_t j, auto part) {
      store(load<V>(dreads + j, part) + load<V>(more + j, part), dreads + j, part);
    });
  }
  if (a.dweights) {
    const A* more = static_cast<const A*>(a.dweights) + place * a.every() * a.rows;
    for_each_vec<V>(a.every() * a.rows, [&](int64_t j, auto part) {
      store(load<V>(d.weights + j, part) + load<V>(more + j, part), d.weights + j, part);
    });
  }
  column_access_backward(a, before, after, d.memory, z.stride, at.weights, dreads, d.weights, heads, dheads);
  NtmAddress<A> address(a, room);
  address.weigh(a, before, z.stride, heads);
  LocationAddressArgs l = address.location(a, heads, t ? at.before : initial);
  l.weights = at.weights, l.dweights = d.weights, l.dweights_r = a.rows, l.dcontent = dcontent, l.dprevious = dprevious;
  l.dgate = dgate, l.dshift = dshift, l.dsharpen = dsharpen;
  for (int64_t h = 0; h < a.every(); h++) location_address_backward<A>(l, 0, h, address.room);
  convert_run(dprevious, d.weights, a.every() * a.rows);
  ntm_similarity_backward(a, before, d.memory, z.stride, address, dcontent, shrink, heads, dheads);
  ntm_slopes(a, heads, dheads, dgate, dshift, dsharpen);
}

// The gradients of the state before the first step.
template <class S>
void ntm_initial_gradients(const NtmArgs& a, int64_t b, const NtmCarried<acc_t<S>>& d, int64_t stride) {
  const int64_t read = a.readers * a.rows, write = a.writers * a.rows;
  const auto run = [&](const acc_t<S>* from, void* to, int64_t n) {
    if (to) convert_run(from, static_cast<S*>(to) + b * n, n);
  };
  run(d.weights, a.dread_weights, read), run(d.weights + read, a.dwrite_weights, write);
  run(d.entered + a.features, a.dreads0, a.read()), run(d.entered + a.features + a.read(), a.dh, a.hidden);
  run(d.cell, a.dc, a.hidden);
  if (!a.dmemory) return;
  S* out = static_cast<S*>(a.dmemory) + b * a.rows * a.width;
  for (int64_t n = 0; n < a.rows; n++)
    for (int64_t w = 0; w < a.width; w++) out[n * a.width + w] = convert<S>::from(d.memory[w * stride + n]);
}

template <class S>
void ntm_backward(const NtmArgs& a, int64_t first, int64_t count, void* scratch) {
  using A = acc_t<S>;
  const NtmSizes<A> z(a);
  const int64_t segment = ntm_segment(a.steps), segments = (a.steps + segment - 1) / segment;
  A *kept = static_cast<A*>(scratch), *within = kept + kNtmTile * segments * z.memory,
    *initial = within + kNtmTile * (segment + 1) * z.memory, *carried = initial + kNtmTile * z.weights;
  const int64_t carry = z.memory + z.weights + z.state + a.hidden + 16;
  A *from_heads = carried + kNtmTile * carry, *room = from_heads + kNtmTile * z.state;
  const auto row = [&](int64_t i) -> NtmCarried<A> {
    A *memory = carried + i * (z.memory + z.weights + a.hidden + 16), *weights = memory + z.memory;
    A* entered = carried + kNtmTile * (z.memory + z.weights + a.hidden + 16) + i * a.depth();
    return {memory, weights, entered, weights + z.weights};
  };
  const auto replay = [&](int64_t t, int64_t b, const A* from, A* to) {
    const NtmPlace<A> at(a, t, b);
    column_write(a, from, to, z.stride, at.weights + a.readers * a.rows, NtmHeads<A>(a, at.heads));
  };
  for (int64_t i = 0; i < count; i++) {
    const int64_t b = first + i;
    const NtmCarried<A> d = row(i);
    clear(d.memory, z.memory), clear(d.weights, a.every() * a.rows), clear(d.entered, a.depth()),
        clear(d.cell, a.hidden);
    if (a.dlast_memory) {
      const S* from = static_cast<const S*>(a.dlast_memory) + b * a.rows * a.width;
      for (int64_t n = 0; n < a.rows; n++)
        for (int64_t w = 0; w < a.width; w++) d.memory[w * z.stride + n] = to_float(from[n * a.width + w]);
    }
    if (a.dcell) convert_run(static_cast<const S*>(a.dcell) + b * a.hidden, d.cell, a.hidden);
    ntm_initial_weights<S>(a, b, initial + i * z.weights);
    A* now = within + i * z.memory;
    ntm_initial_memory<S>(a, b, now, z.stride);
    for (int64_t t = 0; t < a.steps; t++) {
      if (t % segment == 0) convert_run(now, kept + (t / segment * kNtmTile + i) * z.memory, z.stride * a.width);
      if (t + 1 < a.steps) replay(t, b, now, now);
    }
  }
  for (int64_t t = a.steps - 1; t >= 0; t--) {
    const int64_t begin = t / segment * segment, s = t - begin;
    const auto memory = [&](int64_t j, int64_t i) { return within + (j * kNtmTile + i) * z.memory; };
    for (int64_t i = 0; i < count && (t + 1 == a.steps || (t + 1) % segment == 0); i++) {
      convert_run(kept + (t / segment * kNtmTile + i) * z.memory, memory(0, i), z.stride * a.width);
      for (int64_t j = 0; j <= s; j++) replay(begin + j, first + i, memory(j, i), memory(j + 1, i));
    }
    for (int64_t i = 0; i < count; i++)
      ntm_heads_backward<S>(a, t, first + i, memory(s, i), memory(s + 1, i), initial + i * z.weights, row(i), room);
    const int64_t place = t * a.batch + first;
    times(static_cast<const A*>(a.dheads) + place * a.head_row(), a.head_row(), count, a.projected(),
          static_cast<const A*>(a.projection), a.hidden, static_cast<const A*>(nullptr), from_heads, a.hidden);
    for (int64_t i = 0; i < count; i++)
      controller_backward<S>(a, t, first + i, NtmPlace<A>(a, t, first + i), from_heads + i * a.hidden, row(i).entered,
                             row(i).cell);
    times(static_cast<const A*>(a.dgates) + place * 4 * a.hidden, 4 * a.hidden, count, 4 * a.hidden,
          static_cast<const A*>(a.controller), a.depth(), static_cast<const A*>(nullptr), row(0).entered, a.depth());
    for (int64_t i = 0; i < count && a.dinput; i++)
      convert_run(row(i).entered, static_cast<S*>(a.dinput) + (place + i) * a.features, a.features);
  }
  for (int64_t i = 0; i < count; i++) ntm_initial_gradients<S>(a, first + i, row(i), z.stride);
}

// Rows [begin, end) of the 4H of the controller's matrix, then of the P of the heads' one, with their biases.
template <class S>
void ntm_weights(const NtmArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  const int64_t gates = 4 * a.hidden, depth = a.depth();
  const A* h = static_cast<const A*>(a.entered) + a.batch * depth + a.features + a.read();
  A *sum = static_cast<A*>(scratch), *bias = sum + (end - begin) * (depth + 16);
  const int64_t middle = end < gates ? end : gates;
  if (begin < gates) controller_weights<S>(a, begin, middle, sum, bias);
  const int64_t from = begin > gates ? begin - gates : 0, to = end - gates;
  if (to <= from) return;
  sum_outer(a.dheads, a.head_row(), from, to - from, h, depth, a.hidden, a.steps * a.batch, sum, bias);
  each_projection(a, [&](const void*, int which, int64_t rows, int64_t first) {
    for (int64_t p = from > first ? from : first; p < to && p < first + rows; p++) {
      if (!a.dweight[which]) continue;
      S* out = static_cast<S*>(a.dweight[which]) + (p - first) * (a.hidden + 1);
      convert_run(sum + (p - from) * a.hidden, out, a.hidden);
      out[a.hidden] = convert<S>::from(bias[p - from]);
    }
  });
}

}  // namespace

const NtmKernels ntm_sequence = {
    ntm_scratch,
    MK_FLOAT_TYPES(ntm_pack),
    MK_FLOAT_TYPES(ntm_forward),
    MK_FLOAT_TYPES(ntm_backward),
    MK_FLOAT_TYPES(ntm_weights),
};

}  // namespace mk::cpu::MK_LEVEL
