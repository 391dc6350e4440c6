// dnc_sequence, all steps of a few batch rows at a time: batch outer, time inner. Memory and links of a row stay in the
// cache through all steps; with a controller the rows of a tile, as many as the L2 cache holds, share the reads of its
// weights. Forward keeps weights, usage, interface and controller of each step: O(R N + W) a row. Backward has memories
// and links again by replaying the writes: once forward to keep every one that begins a segment of about sqrt(T) / 2
// steps, then within each segment from the last to the first. Link matrices cost most, N^2 elements: forward reads and
// writes each once a step, backward reads it, its gradient twice, and replays it twice (one read, one write).
// Precision: the accumulation type throughout, state included; what is public is rounded once.
#include "cpu/generic/dnc_memory.inl.h"
#include "cpu/generic/sequence_controller.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

enum class Bend { linear, sigmoid, tanh, softplus, oneplus };

// body(first element, count, kind) for the runs of an interface vector but for the modes.
template <class A, class Body>
MK_INLINE void each_run(const DncArgs& a, const DncAsk<A>& ask, const Body& body) {
  const int64_t r = a.readers, u = a.writers, w = a.width;
  const Bend strength = a.oneplus ? Bend::oneplus : Bend::softplus, key = a.bounded ? Bend::tanh : Bend::linear;
  body(ask.read_key, r * w, key), body(ask.read_strength, r, strength), body(ask.write_key, u * w, key);
  body(ask.write_strength, u, strength), body(ask.erase, u * w, Bend::sigmoid), body(ask.add, u * w, key);
  body(ask.free, r + 2 * u, Bend::sigmoid);
  if (a.key_mask) body(ask.write_mask, a.every() * w, Bend::sigmoid);
  if (a.sharpen_links) body(ask.sharp, 2 * r, Bend::oneplus);
}

// The activations of an interface vector, in place.
template <class A>
void dnc_activate(const DncArgs& a, A* row) {
  using V = Vec<A>;
  const DncAsk<A> ask(a, row);
  each_run(a, ask, [&](A* x, int64_t n, Bend bend) {
    if (bend == Bend::linear) return;
    for_each_vec<V>(n, [&](int64_t j, auto part) {
      V v = load<V>(x + j, part);
      if (bend == Bend::sigmoid)
        v = sigmoid(v);
      else if (bend == Bend::tanh)
        v = tanh(v);
      else
        v = softplus(v) + V::set1(bend == Bend::oneplus);
      store(v, x + j, part);
    });
  });
  const int64_t modes = 2 * a.writers + 1;
  for (int64_t r = 0; r < a.readers; r++) {
    A* x = ask.modes + r * modes;
    softmax_run(modes, x, [&](int64_t j, auto part) { return load<V>(x + j, part); });
  }
}

// The gradient before the activations, in place, from the activated vector and its gradient.
template <class A>
void dnc_slopes(const DncArgs& a, const A* row, A* drow) {
  using V = Vec<A>;
  const V one = V::set1(1);
  const DncAsk<A> d(a, drow);
  each_run(a, d, [&](A* dx, int64_t n, Bend bend) {
    if (bend == Bend::linear) return;
    const A* x = row + (dx - drow);
    for_each_vec<V>(n, [&](int64_t j, auto part) {
      const V y = load<V>(x + j, part);
      V slope;
      if (bend == Bend::sigmoid)
        slope = y * (one - y);
      else if (bend == Bend::tanh)
        slope = one - y * y;
      else  // of y = softplus(x) it is 1 - exp(-y)
        slope = one - exp(bend == Bend::oneplus ? one - y : -y);
      store(load<V>(dx + j, part) * slope, dx + j, part);
    });
  });
  const int64_t modes = 2 * a.writers + 1;
  for (int64_t r = 0; r < a.readers; r++) {
    A* dx = d.modes + r * modes;
    const A* x = row + (dx - drow);
    const V centre = V::set1(dot_of(dx, x, modes));
    for_each_vec<V>(modes, [&](int64_t j, auto part) {
      store(load<V>(x + j, part) * (load<V>(dx + j, part) - centre), dx + j, part);
    });
  }
}

template <class S>
void dnc_pack(const DncArgs& a, bool backward) {
  if (!a.controlled) return;
  pack_controller<S>(a, backward);
  pack_matrix<S>(a.weight_interface, a.hidden, a.asks(), a.hidden, a.projection, 0, 0, a.asks(), a.hidden, !backward);
  if (!backward)
    convert_run(static_cast<const S*>(a.bias_interface), static_cast<acc_t<S>*>(a.projection_bias), a.asks());
}

// Memory and links of a row before the first step; the memory transposed.
template <class S>
void dnc_initial(const DncArgs& a, int64_t b, acc_t<S>* memory, int64_t stride, acc_t<S>* link) {
  const S* from = static_cast<const S*>(a.memory) + b * a.memory_b;
  for (int64_t n = 0; n < a.rows; n++)
    for (int64_t w = 0; w < a.width; w++) memory[w * stride + n] = to_float(from[n * a.memory_n + w]);
  const int64_t links = a.writers * a.rows * a.rows;
  convert_run(static_cast<const S*>(a.link) + b * links, link, links);
}

// usage [N], weights [R + U][N], precedence [U][N] before the first step.
template <class S>
void dnc_initial_vectors(const DncArgs& a, int64_t b, acc_t<S>* to) {
  const auto add = [&](const void* from, int64_t heads) {
    const int64_t n = heads * a.rows;
    convert_run(static_cast<const S*>(from) + b * n, to, n), to += n;
  };
  add(a.usage, 1), add(a.read_weights, a.readers), add(a.write_weights, a.writers), add(a.precedence, a.writers);
}

// Back from the transposed layout.
template <class S>
void dnc_memory_out(const DncArgs& a, int64_t b, const acc_t<S>* memory, int64_t stride, void* out) {
  S* to = static_cast<S*>(out) + b * a.rows * a.width;
  for (int64_t n = 0; n < a.rows; n++)
    for (int64_t w = 0; w < a.width; w++) to[n * a.width + w] = convert<S>::from(memory[w * stride + n]);
}

// The scratch of a tile: what its rows own, [tile] of each, and the room they share.
template <class A>
struct DncTile {
  int64_t stride, memory_size, link_size, initial_size;
  A *memory, *link, *other, *initial, *reads, *ones;                                    // both directions
  A *kept_memory, *kept_link, *within_memory, *within_link, *carried, *entered, *from;  // backward
  int64_t carry;
  DncRoom<A> room;
  int64_t used;
  DncTile(const DncArgs& a, A* base, bool backward) : DncTile(a, Pieces<A>{base}, backward) {}

  MK_INLINE DncCarried<A> row(const DncArgs& a, int64_t i) const {
    DncCarried<A> d;
    d.memory = carried + i * carry, d.link = d.memory + memory_size, d.usage = d.link + link_size;
    d.weights = d.usage + a.rows, d.precedence = d.weights + a.every() * a.rows;
    return d;
  }
  MK_INLINE A* cell(const DncArgs& a, int64_t i) const { return row(a, i).precedence + a.writers * a.rows + 16; }

 private:
  DncTile(const DncArgs& a, Pieces<A> take, bool backward) : room(a, take) {
    const int64_t n = a.tile, segments = a.segments();
    stride = a.padded_rows(), memory_size = stride * a.width + 16,
    link_size = (a.writers * a.rows * a.rows + 31) / 16 * 16;
    initial_size = DncPlace<A>::initial_size(a);
    memory = take(n * memory_size), link = take(n * link_size), initial = take(n * initial_size);
    reads = take(a.read());
    if (!backward) {
      other = take(dnc_in_place(a) ? 0 : n * link_size);
    } else {
      kept_memory = take(segments * n * memory_size), kept_link = take(segments * n * link_size);
      within_memory = take((a.segment + 1) * n * memory_size), within_link = take(a.segment * n * link_size);
      carry = memory_size + link_size + ((1 + a.every() + a.writers) * a.rows + a.hidden + 48) / 16 * 16;
      carried = take(n * carry), entered = take(n * a.depth()), from = take(n * a.hidden);
    }
    used = take.used;
  }
};

template <class S>
int64_t dnc_scratch(const DncArgs& a, bool backward) {
  return DncTile<acc_t<S>>(a, nullptr, backward).used * int64_t(sizeof(acc_t<S>));
}

template <class A>
void set_ones(const DncArgs& a, const DncRoom<A>& room) {
  for (int64_t n = 0; n < a.rows; n++) room.ones[n] = 1;
}

// The interface vectors of a step, before their activations.
template <class S>
void dnc_asked(const DncArgs& a, int64_t t, int64_t first, int64_t count, const DncTile<acc_t<S>>& z) {
  using A = acc_t<S>;
  const DncPlace<A> head(a, t, first, z.initial);
  for (int64_t i = 0; i < count; i++) {
    const S* x = static_cast<const S*>(a.input) + t * a.input_t + (first + i) * a.input_b;
    const DncPlace<A> at(a, t, first + i, z.initial);
    convert_run(x, a.controlled ? at.entered : at.asked, a.features);
  }
  if (!a.controlled) return;
  const int64_t gates = 4 * a.hidden, into = a.features + a.read();
  times(head.entered, a.depth(), count, a.depth(), static_cast<const A*>(a.controller), gates,
        static_cast<const A*>(a.controller_bias), head.gates, gates);
  for (int64_t i = 0; i < count; i++) controller_forward<S>(a, t, first + i, DncPlace<A>(a, t, first + i, z.initial));
  times(head.next + into, a.depth(), count, a.hidden, static_cast<const A*>(a.projection), a.asks(),
        static_cast<const A*>(a.projection_bias), head.asked, a.asks());
}

template <class S>
void dnc_forward(const DncArgs& a, int64_t first, int64_t count, void* scratch) {
  using A = acc_t<S>;
  DncTile<A> z(a, static_cast<A*>(scratch), false);
  set_ones(a, z.room);
  const auto initial = [&](int64_t i) { return z.initial + i * z.initial_size; };
  for (int64_t i = 0; i < count; i++) {
    dnc_initial<S>(a, first + i, z.memory + i * z.memory_size, z.stride, z.link + i * z.link_size);
    dnc_initial_vectors<S>(a, first + i, initial(i));
    if (a.controlled) controller_start<S>(a, first + i);
  }
  const bool in_place = dnc_in_place(a);
  for (int64_t t = 0; t < a.steps; t++) {
    dnc_asked<S>(a, t, first, count, z);
    for (int64_t i = 0; i < count; i++) {
      const DncPlace<A> at(a, t, first + i, initial(i));
      dnc_activate(a, at.asked);
      A *reads = a.controlled ? at.next + a.features : z.reads, *link = z.link + i * z.link_size;
      dnc_forward_row(a, at, z.room, z.memory + i * z.memory_size, z.stride, link,
                      in_place ? link : z.other + i * z.link_size, reads);
      convert_run(reads, static_cast<S*>(a.all_reads) + (t * a.batch + first + i) * a.read(), a.read());
    }
    if (!in_place) {
      A* const link = z.link;
      z.link = z.other, z.other = link;
    }
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t b = first + i, links = a.writers * a.rows * a.rows, last = a.writers * a.rows;
    if (a.controlled) clear(DncPlace<A>(a, a.steps, b, initial(i)).entered, a.features);
    dnc_memory_out<S>(a, b, z.memory + i * z.memory_size, z.stride, a.last_memory);
    convert_run(z.link + i * z.link_size, static_cast<S*>(a.last_link) + b * links, links);
    const DncPlace<A> end(a, a.steps, b, initial(i));
    convert_run(end.usage_before, static_cast<S*>(a.last_usage) + b * a.rows, a.rows);
    convert_run(end.precedence_before, static_cast<S*>(a.last_precedence) + b * last, last);
  }
}

// Checkpoints of a row, and the gradients it starts with.
template <class S>
void dnc_backward_start(const DncArgs& a, int64_t i, int64_t b, const DncTile<acc_t<S>>& z) {
  using A = acc_t<S>;
  A* initial = z.initial + i * z.initial_size;
  dnc_initial_vectors<S>(a, b, initial);
  const auto memory_at = [&](int64_t s) { return z.kept_memory + (s * a.tile + i) * z.memory_size; };
  const auto link_at = [&](int64_t s) { return z.kept_link + (s * a.tile + i) * z.link_size; };
  A *memory = a.steps ? memory_at(0) : z.memory + i * z.memory_size,
    *link = a.steps ? link_at(0) : z.link + i * z.link_size;
  dnc_initial<S>(a, b, memory, z.stride, link);
  const int64_t last_segment = (a.segments() - 1) * a.segment;
  for (int64_t t = 0; t < last_segment; t++) {
    const bool kept = (t + 1) % a.segment == 0;
    const DncPlace<A> at(a, t, b, initial);
    A* to = kept ? memory_at((t + 1) / a.segment) : z.memory + i * z.memory_size;
    dnc_rewrite(a, at, z.room, memory, to, z.stride), memory = to;
    to = kept ? link_at((t + 1) / a.segment) : z.link + i * z.link_size;
    dnc_relink(a, at, z.room, link, to), link = to;
  }
  const DncCarried<A> d = z.row(a, i);
  clear(d.memory, z.memory_size), clear(d.weights, a.every() * a.rows);
  const auto start = [&](const void* from, A* to, int64_t n) {
    from ? convert_run(static_cast<const S*>(from) + b * n, to, n) : clear(to, n);
  };
  start(a.dlast_link, d.link, a.writers * a.rows * a.rows), start(a.dlast_usage, d.usage, a.rows);
  start(a.dlast_precedence, d.precedence, a.writers * a.rows);
  if (a.dlast_memory) {
    const S* from = static_cast<const S*>(a.dlast_memory) + b * a.rows * a.width;
    for (int64_t n = 0; n < a.rows; n++)
      for (int64_t w = 0; w < a.width; w++) d.memory[w * z.stride + n] = to_float(from[n * a.width + w]);
  }
  if (!a.controlled) return;
  start(a.dcell, z.cell(a, i), a.hidden), clear(z.entered + i * a.depth(), a.depth());
}

// The gradients of the state before the first step.
template <class S>
void dnc_initial_gradients(const DncArgs& a, int64_t i, int64_t b, const DncTile<acc_t<S>>& z) {
  const DncCarried<acc_t<S>> d = z.row(a, i);
  const int64_t read = a.readers * a.rows, write = a.writers * a.rows;
  const auto run = [&](const acc_t<S>* from, void* to, int64_t n) {
    if (to) convert_run(from, static_cast<S*>(to) + b * n, n);
  };
  run(d.usage, a.dusage, a.rows), run(d.link, a.dlink, write * a.rows), run(d.precedence, a.dprecedence, write);
  run(d.weights, a.dread_weights, read), run(d.weights + read, a.dwrite_weights, write);
  if (a.dmemory) dnc_memory_out<S>(a, b, d.memory, z.stride, a.dmemory);
  if (!a.controlled) return;
  const acc_t<S>* entered = z.entered + i * a.depth() + a.features;
  run(entered, a.dreads0, a.read()), run(entered + a.read(), a.dh, a.hidden), run(z.cell(a, i), a.dc, a.hidden);
}

// The memory of a row at one step, from the carried gradients to those of the step before and of the interface.
template <class S>
void dnc_step_backward(const DncArgs& a, int64_t t, int64_t i, int64_t b, const DncTile<acc_t<S>>& z,
                       const acc_t<S>* before, const acc_t<S>* after, const acc_t<S>* link) {
  using A = acc_t<S>;
  const DncPlace<A> at(a, t, b, z.initial + i * z.initial_size);
  const DncCarried<A> d = z.row(a, i);
  const int64_t place = t * a.batch + b, asks = a.asks();
  A* dreads = a.controlled ? z.entered + i * a.depth() + a.features : z.reads;
  A* drow = a.controlled ? static_cast<A*>(a.dasked) + place * asks : z.room.dask;
  if (!a.controlled) clear(dreads, a.read());
  if (a.dreads) {
    using V = Vec<A>;
    const S* more = static_cast<const S*>(a.dreads) + place * a.read();
    for_each_vec<V>(a.read(), [&](int64_t j, auto part) {
      store(load<V>(dreads + j, part) + load<V>(more + j, part), dreads + j, part);
    });
  }
  if (a.dweights)
    add_run(static_cast<const A*>(a.dweights) + place * a.every() * a.rows, d.weights, a.every() * a.rows);
  dnc_backward_row(a, at, z.room, before, after, link, z.stride, z.memory + i * z.memory_size, dreads, d,
                   DncAsk<A>(a, drow));
  dnc_slopes(a, at.asked, drow);
  if (!a.controlled && a.dinput) convert_run(drow, static_cast<S*>(a.dinput) + place * asks, asks);
}

template <class S>
void dnc_backward(const DncArgs& a, int64_t first, int64_t count, void* scratch) {
  using A = acc_t<S>;
  const DncTile<A> z(a, static_cast<A*>(scratch), true);
  set_ones(a, z.room);
  for (int64_t i = 0; i < count; i++) dnc_backward_start<S>(a, i, first + i, z);
  for (int64_t t = a.steps - 1; t >= 0; t--) {
    const int64_t segment = t / a.segment, begin = segment * a.segment, s = t - begin;
    const auto memory = [&](int64_t j, int64_t i) {
      return j ? z.within_memory + (j * a.tile + i) * z.memory_size
               : z.kept_memory + (segment * a.tile + i) * z.memory_size;
    };
    const auto link = [&](int64_t j, int64_t i) {
      return j ? z.within_link + (j * a.tile + i) * z.link_size : z.kept_link + (segment * a.tile + i) * z.link_size;
    };
    for (int64_t i = 0; i < count; i++) {
      const A* initial = z.initial + i * z.initial_size;
      for (int64_t j = 0; j <= s && (t + 1 == a.steps || (t + 1) % a.segment == 0); j++) {
        const DncPlace<A> at(a, begin + j, first + i, initial);
        dnc_rewrite(a, at, z.room, memory(j, i), memory(j + 1, i), z.stride);
        if (j < s) dnc_relink(a, at, z.room, link(j, i), link(j + 1, i));
      }
      dnc_step_backward<S>(a, t, i, first + i, z, memory(s, i), memory(s + 1, i), link(s, i));
    }
    if (!a.controlled) continue;
    const int64_t place = t * a.batch + first;
    times(static_cast<const A*>(a.dasked) + place * a.asks(), a.asks(), count, a.asks(),
          static_cast<const A*>(a.projection), a.hidden, static_cast<const A*>(nullptr), z.from, a.hidden);
    for (int64_t i = 0; i < count; i++)
      controller_backward<S>(a, t, first + i, DncPlace<A>(a, t, first + i, z.initial), z.from + i * a.hidden,
                             z.entered + i * a.depth(), z.cell(a, i));
    times(static_cast<const A*>(a.dgates) + place * 4 * a.hidden, 4 * a.hidden, count, 4 * a.hidden,
          static_cast<const A*>(a.controller), a.depth(), static_cast<const A*>(nullptr), z.entered, a.depth());
    for (int64_t i = 0; i < count && a.dinput; i++)
      convert_run(z.entered + i * a.depth(), static_cast<S*>(a.dinput) + (place + i) * a.features, a.features);
  }
  for (int64_t i = 0; i < count; i++) dnc_initial_gradients<S>(a, i, first + i, z);
}

// Rows [begin, end) of the 4H of the controller's matrix, then of the P of the interface's one, with their biases.
template <class S>
void dnc_weights(const DncArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  const int64_t gates = 4 * a.hidden, depth = a.depth(), middle = end < gates ? end : gates;
  A *sum = static_cast<A*>(scratch), *bias = sum + (end - begin) * (depth + 16);
  if (begin < gates) controller_weights<S>(a, begin, middle, sum, bias);
  const int64_t from = begin > gates ? begin - gates : 0, n = end - gates - from;
  if (n <= 0) return;
  const A* h = static_cast<const A*>(a.entered) + a.batch * depth + a.features + a.read();
  sum_outer(a.dasked, a.asks(), from, n, h, depth, a.hidden, a.steps * a.batch, sum, bias);
  if (a.dweight[4]) convert_run(sum, static_cast<S*>(a.dweight[4]) + from * a.hidden, n * a.hidden);
  if (a.dweight[5]) convert_run(bias, static_cast<S*>(a.dweight[5]) + from, n);
}

}  // namespace

const DncKernels dnc_sequence = {
    MK_FLOAT_TYPES(dnc_scratch),  MK_FLOAT_TYPES(dnc_pack),    MK_FLOAT_TYPES(dnc_forward),
    MK_FLOAT_TYPES(dnc_backward), MK_FLOAT_TYPES(dnc_weights),
};

}  // namespace mk::cpu::MK_LEVEL
