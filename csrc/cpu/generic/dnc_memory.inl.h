// A step of a DNC's memory and its gradient for one batch row: usage, allocation and links by the rows of their own
// ops, content by dnc_content. The memory lies transposed (column_memory.inl.h), the links as the op has them, and both
// are changed in place.
#pragma once
#include "cpu/generic/allocation_rows.inl.h"
#include "cpu/generic/dnc_content.inl.h"
#include "cpu/generic/link_rows.inl.h"
#include "cpu/generic/sequence_controller.inl.h"
#include "cpu/generic/usage_rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The parts of an interface vector, or of its gradient; the masks are null without key_mask, sharp without sharpening.
template <class A>
struct DncAsk {
  A *read_key, *read_strength, *write_key, *write_strength, *erase, *add, *free, *allocation, *write, *modes,
      *write_mask = nullptr, *read_mask = nullptr, *sharp = nullptr;
  MK_INLINE DncAsk(const DncArgs& a, A* row) {
    const int64_t r = a.readers, u = a.writers, w = a.width;
    read_key = row, read_strength = read_key + r * w, write_key = read_strength + r, write_strength = write_key + u * w;
    erase = write_strength + u, add = erase + u * w, free = add + u * w, allocation = free + r, write = allocation + u;
    modes = write + u, row = modes + r * (2 * u + 1);
    if (a.key_mask) write_mask = row, read_mask = write_mask + u * w, row = read_mask + r * w;
    if (a.sharpen_links) sharp = row;
  }
};

// Of one row at one step, where the saved outputs lie and those of the step before (or the initial state).
template <class A>
struct DncPlace {
  A *asked, *usage, *weights, *precedence, *followed;
  const A *usage_before, *weights_before, *precedence_before;
  A *entered = nullptr, *next = nullptr, *gates = nullptr, *cell = nullptr;
  MK_INLINE DncPlace(const DncArgs& a, int64_t t, int64_t b, const A* initial) {
    const int64_t i = t * a.batch + b, n = a.rows, each = a.every() * n, last = a.writers * n;
    asked = static_cast<A*>(a.asked) + i * a.asks(), usage = static_cast<A*>(a.usages) + i * n;
    weights = static_cast<A*>(a.weights) + i * each, precedence = static_cast<A*>(a.precedences) + i * last;
    followed = static_cast<A*>(a.followed) + i * 2 * a.readers * last;
    usage_before = t ? usage - a.batch * n : initial;
    weights_before = t ? weights - a.batch * each : initial + n;
    precedence_before = t ? precedence - a.batch * last : initial + n + each;
    if (!a.controlled) return;
    entered = static_cast<A*>(a.entered) + i * a.depth(), next = entered + a.batch * a.depth();
    gates = static_cast<A*>(a.gates) + i * 4 * a.hidden, cell = static_cast<A*>(a.cells) + i * a.hidden;
  }
  static MK_INLINE int64_t initial_size(const DncArgs& a) { return (1 + a.every() + a.writers) * a.rows + 16; }
};

// Scratch of a thread, the same for all rows and steps.
template <class A>
struct DncRoom {
  A *kept, *free, *wanted, *similar, *ways, *gates, *ones, *partial, *links, *sort, *sums;
  A *dfree, *dwanted, *dsimilar, *dways, *dwrite, *dread, *dgates, *dusage, *dkept, *dextra, *dask;
  DncContent<A> reading, writing;
  static MK_INLINE LinkArgs sizes(const DncArgs& a) {
    LinkArgs l{};
    l.batch = 1, l.heads = a.writers, l.read_heads = a.readers, l.rows = a.rows, l.update = true;
    return l;
  }
  MK_INLINE DncRoom(const DncArgs& a, Pieces<A>& take) : reading(a, take), writing(a, take) {
    const int64_t n = a.rows, written = a.writers * n, read = a.readers * n;
    const LinkArgs l = sizes(a);
    AllocationArgs s{};
    s.rows = n, s.heads = a.writers;
    UsageArgs u{};
    u.write_heads = a.writers, u.read_heads = a.readers;
    kept = take(n), free = take(written), wanted = take(written), similar = take(read), ones = take(n);
    ways = take(2 * read * a.writers), gates = take(a.writers), partial = take(a.writers * link_partial(l, true));
    links = take(link_scratch(l, true)), sums = take(usage_scratch(u));
    sort = take(allocation_scratch(s, sizeof(A), true) / int64_t(sizeof(A)) + 16);
    dfree = take(written), dwanted = take(written), dsimilar = take(read), dways = take(2 * read * a.writers);
    dwrite = take(written), dread = take(read + a.readers), dgates = take(a.writers), dusage = take(n), dkept = take(n);
    dextra = take(written > read ? written : read), dask = take(a.asks());
  }
};

struct DncSide {
  int64_t rows, width, readers, writers;
  static MK_INLINE bool reads_written() { return true; }
};

template <class A>
MK_INLINE DncHeads<A> dnc_heads(const DncArgs& a, bool reading, const DncAsk<A>& ask) {
  const A inside = a.cosine == DncCosine::product ? A(0) : A(1e-6);
  const A outside = a.cosine == DncCosine::roots ? A(0) : A(1e-6);
  if (reading) return {a.rows, a.width, a.readers, ask.read_key, ask.read_strength, ask.read_mask, inside, outside};
  return {a.rows, a.width, a.writers, ask.write_key, ask.write_strength, ask.write_mask, inside, outside};
}

// The call of usage on a row; with `erased` that of prod_r(1 - free_r read_r) alone.
template <class A>
MK_INLINE UsageArgs dnc_usage(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask, const DncRoom<A>& room,
                              bool erased) {
  UsageArgs u{};
  u.rows = a.rows, u.write_heads = erased ? 0 : a.writers, u.read_heads = a.readers;
  u.usage = erased ? room.ones : at.usage_before, u.read = at.weights_before, u.read_r = a.rows, u.free = ask.free;
  u.write = at.weights_before + a.readers * a.rows, u.write_h = a.rows;
  return u;
}

template <class A>
MK_INLINE AllocationArgs dnc_allocation(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask,
                                        const DncRoom<A>& room) {
  for (int64_t h = 0; h < a.writers; h++) room.gates[h] = ask.allocation[h] * ask.write[h];
  AllocationArgs s{};
  s.rows = a.rows, s.heads = a.writers, s.eps = 1e-6, s.usage = at.usage, s.gates = room.gates;
  return s;
}

template <class A>
MK_INLINE LinkArgs dnc_link(const DncArgs& a, const DncPlace<A>& at, const A* link) {
  LinkArgs l = DncRoom<A>::sizes(a);
  l.link = link, l.link_h = a.rows * a.rows, l.link_n = a.rows;
  l.precedence = at.precedence_before, l.precedence_h = a.rows;
  l.write = at.weights + a.readers * a.rows, l.write_h = a.rows, l.read = at.weights_before, l.read_r = a.rows;
  return l;
}

// What is not freed of each row, to room.kept; and the memory without the rest.
template <class A>
void dnc_deallocate(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask, const DncRoom<A>& room,
                    const A* from, A* to, int64_t stride) {
  using V = Vec<A>;
  UsageArgs u = dnc_usage(a, at, ask, room, true);
  u.out = room.kept;
  usage_forward<A>(u, 0);
  for (int64_t w = 0; w < a.width; w++)
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      store(load<V>(room.kept + n, part) * load<V>(from + w * stride + n, part), to + w * stride + n, part);
    });
}

// The memory after the step from that before, from what forward kept.
template <class A>
void dnc_rewrite(const DncArgs& a, const DncPlace<A>& at, const DncRoom<A>& room, const A* from, A* to,
                 int64_t stride) {
  const DncAsk<A> ask(a, at.asked);
  if (a.deallocate) dnc_deallocate(a, at, ask, room, from, to, stride), from = to;
  column_write(DncSide{a.rows, a.width, 0, a.writers}, from, to, stride, at.weights + a.readers * a.rows, ask);
}

// The links after the step from those before, which may lie in the same place.
template <class A>
void dnc_relink(const DncArgs& a, const DncPlace<A>& at, const DncRoom<A>& room, const A* from, A* to) {
  LinkArgs l = dnc_link(a, at, from);
  l.read_heads = 0, l.link_new = to;
  for (int64_t h = 0; h < a.writers; h++) link_forward<A>(l, h, 0, a.rows, room.partial, room.links);
}

// The weights of following the links, [2][R][U][N]: those kept by forward, or sharpened in room.ways.
template <class A>
const A* dnc_ways(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask, const DncRoom<A>& room) {
  using V = Vec<A>;
  if (!a.sharpen_links) return at.followed;
  for (int64_t i = 0; i < 2 * a.readers * a.writers; i++) {
    const A *from = at.followed + i * a.rows,
            power = ask.sharp[i / a.writers % a.readers * 2 + i / (a.readers * a.writers)];
    softmax_run(a.rows, room.ways + i * a.rows, [&](int64_t n, auto part) {
      return V::set1(power) * log(in_part(load<V>(from + n, part), V::set1(1), part) + V::set1(A(1e-6)));
    });
  }
  return room.ways;
}

// write = gate (wanted + allocation (free - wanted)) of every write head.
template <class A>
void dnc_write_weights(const DncArgs& a, const DncAsk<A>& ask, const DncRoom<A>& room, A* write) {
  using V = Vec<A>;
  for (int64_t h = 0; h < a.writers; h++) {
    const V gate = V::set1(ask.write[h]), allocation = V::set1(ask.allocation[h]);
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const int64_t i = h * a.rows + n;
      const V wanted = load<V>(room.wanted + i, part);
      store(gate * fma(allocation, load<V>(room.free + i, part) - wanted, wanted), write + i, part);
    });
  }
}

// Whether forward may update the links in place: link_rows then takes all read heads together, before a row is written.
MK_INLINE bool dnc_in_place(const DncArgs& a) {
  return a.readers <= 1 || (a.readers <= kHeadsAtOnce && a.rows % kRowsAtOnce == 0);
}

// A step: fills all of `at` but asked, and reads; memory in place, link to `link_new` (link itself if dnc_in_place).
template <class A>
void dnc_forward_row(const DncArgs& a, const DncPlace<A>& at, const DncRoom<A>& room, A* memory, int64_t stride,
                     const A* link, A* link_new, A* reads) {
  using V = Vec<A>;
  const DncAsk<A> ask(a, at.asked);
  const int64_t n_rows = a.rows, ways_size = a.readers * a.writers * n_rows;
  UsageArgs u = dnc_usage(a, at, ask, room, false);
  u.out = at.usage;
  usage_forward<A>(u, 0);
  AllocationArgs s = dnc_allocation(a, at, ask, room);
  s.out = room.free;
  allocation_forward<A>(s, 0, room.sort);
  dnc_content(dnc_heads(a, false, ask), memory, stride, room.writing, room.wanted);
  dnc_write_weights(a, ask, room, at.weights + a.readers * n_rows);
  dnc_rewrite(a, at, room, memory, memory, stride);
  LinkArgs l = dnc_link(a, at, link);
  l.link_new = link_new, l.precedence_new = at.precedence, l.forward = at.followed,
  l.backward = at.followed + ways_size;
  for (int64_t h = 0; h < a.writers; h++) {
    link_forward<A>(l, h, 0, n_rows, room.partial, room.links);
    link_combine_forward<A>(l, h, room.partial, 1);
  }
  const A* ways = dnc_ways(a, at, ask, room);
  dnc_content(dnc_heads(a, true, ask), memory, stride, room.reading, room.similar);
  for (int64_t r = 0; r < a.readers; r++) {
    const A* modes = ask.modes + r * (2 * a.writers + 1);
    for_each_vec<V>(n_rows, [&](int64_t n, auto part) {
      V sum = V::set1(modes[2 * a.writers]) * load<V>(room.similar + r * n_rows + n, part);
      for (int64_t h = 0; h < a.writers; h++) {
        const A* forth = ways + (r * a.writers + h) * n_rows + n;
        sum = fma(V::set1(modes[h]), load<V>(forth + ways_size, part), sum);
        sum = fma(V::set1(modes[a.writers + h]), load<V>(forth, part), sum);
      }
      store(sum, at.weights + r * n_rows + n, part);
    });
  }
  column_read(DncSide{n_rows, a.width, a.readers, 0}, memory, stride, at.weights, reads);
}

// What one row carries from step to step in backward: gradients of [W][N], [U][N][N], [N], [R + U][N], [U][N].
template <class A>
struct DncCarried {
  A *memory, *link, *usage, *weights, *precedence;
};

// From dread, the gradient of the read weights [R][N]: those of modes and sharpness, room.dways and room.dsimilar.
template <class A>
void dnc_modes_backward(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask, const DncAsk<A>& dask,
                        const DncRoom<A>& room, const A* ways, const A* dread) {
  using V = Vec<A>;
  const int64_t n_rows = a.rows, modes = 2 * a.writers + 1;
  if (dask.sharp)
    for (int64_t i = 0; i < 2 * a.readers; i++) dask.sharp[i] = 0;
  for (int64_t r = 0; r < a.readers; r++) {
    const A* d = dread + r * n_rows;
    const auto scaled = [&](const A* of, int64_t mode, A* to) {
      const V scale = V::set1(ask.modes[r * modes + mode]);
      for_each_vec<V>(n_rows, [&](int64_t n, auto part) { store(scale * load<V>(d + n, part), to + n, part); });
      dask.modes[r * modes + mode] = dot_of(d, of, n_rows);
    };
    scaled(room.similar + r * n_rows, 2 * a.writers, room.dsimilar + r * n_rows);
    for (int64_t way = 0; way < 2; way++)
      for (int64_t h = 0; h < a.writers; h++) {
        const int64_t i = ((way * a.readers + r) * a.writers + h) * n_rows;
        A* to = room.dways + i;
        scaled(ways + i, way ? h : a.writers + h, to);
        if (!a.sharpen_links) continue;
        const V power = V::set1(ask.sharp[r * 2 + way]), centre = V::set1(dot_of(to, ways + i, n_rows));
        V sum = V::zero();
        for_each_vec<V>(n_rows, [&](int64_t n, auto part) {
          const V slope = load<V>(ways + i + n, part) * (load<V>(to + n, part) - centre);
          const V shifted = in_part(load<V>(at.followed + i + n, part), V::set1(1), part) + V::set1(A(1e-6));
          sum = fma(slope, log(shifted), sum);
          store(power * slope / shifted, to + n, part);
        });
        dask.sharp[r * 2 + way] += reduce_add(sum);
      }
  }
}

// From room.dwrite: the gates', room.dfree (of the allocation) and room.dwanted (of the content).
template <class A>
void dnc_write_weights_backward(const DncArgs& a, const DncAsk<A>& ask, const DncAsk<A>& dask, const DncRoom<A>& room) {
  using V = Vec<A>;
  for (int64_t h = 0; h < a.writers; h++) {
    const V gate = V::set1(ask.write[h]), allocation = V::set1(ask.allocation[h]);
    V dgate = V::zero(), dallocation = V::zero();
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const int64_t i = h * a.rows + n;
      const V d = load<V>(room.dwrite + i, part), wanted = load<V>(room.wanted + i, part);
      const V more = load<V>(room.free + i, part) - wanted, mixed = d * gate, free = mixed * allocation;
      dgate = fma(d, fma(allocation, more, wanted), dgate), dallocation = fma(mixed, more, dallocation);
      store(free, room.dfree + i, part), store(mixed - free, room.dwanted + i, part);
    });
    dask.write[h] = reduce_add(dgate), dask.allocation[h] = reduce_add(dallocation);
  }
}

// x += y.
template <class A>
MK_INLINE void add_run(const A* y, A* x, int64_t n) {
  using V = Vec<A>;
  for_each_vec<V>(n, [&](int64_t i, auto part) { store(load<V>(x + i, part) + load<V>(y + i, part), x + i, part); });
}

// De-allocation: from d.memory, the gradient of the memory that was written, to that of the memory before; room.dextra
// and dfree get what goes to read weights and free gates. `before` is the memory before the step.
template <class A>
void dnc_deallocate_backward(const DncArgs& a, const DncPlace<A>& at, const DncAsk<A>& ask, const DncRoom<A>& room,
                             const A* before, A* d, int64_t stride, A* dfree) {
  using V = Vec<A>;
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    const V kept = load<V>(room.kept + n, part);
    V sum = V::zero();
    for (int64_t w = 0; w < a.width; w++) {
      const V slope = load<V>(d + w * stride + n, part);
      sum = fma(slope, load<V>(before + w * stride + n, part), sum);
      store(slope * kept, d + w * stride + n, part);
    }
    store(sum, room.dkept + n, part);
  });
  UsageArgs u = dnc_usage(a, at, ask, room, true);
  u.dout = room.dkept, u.dread = room.dextra, u.dfree = dfree;
  usage_backward<A>(u, 0, room.sums);
}

// The gradients of a step, from those of the state after in `d` and of reads. `before` and `after` are the memories
// around it, `link` the links before; `scratch` has room for a memory. Fills dask, before the slopes of activations.
template <class A>
void dnc_backward_row(const DncArgs& a, const DncPlace<A>& at, const DncRoom<A>& room, const A* before, const A* after,
                      const A* link, int64_t stride, A* scratch, const A* dreads, const DncCarried<A>& d,
                      const DncAsk<A>& dask) {
  const DncAsk<A> ask(a, at.asked);
  const int64_t n_rows = a.rows, read = a.readers * n_rows, written = a.writers * n_rows;
  const DncHeads<A> readers = dnc_heads(a, true, ask), writers = dnc_heads(a, false, ask);
  A *dread = d.weights, *dwrite = d.weights + read, *reused = scratch;
  AllocationArgs s = dnc_allocation(a, at, ask, room);
  allocation_replay<A>(s, 0, room.sort, true);
  dnc_content(writers, before, stride, room.writing, room.wanted);
  dnc_content(readers, after, stride, room.reading, room.similar);
  const A *ways = dnc_ways(a, at, ask, room), *kept = before;
  if (a.deallocate) dnc_deallocate(a, at, ask, room, before, reused, stride), kept = reused;

  const DncSide reading{n_rows, a.width, a.readers, 0}, writing{n_rows, a.width, 0, a.writers};
  column_dots_all(reading, after, stride, a.readers, dreads, room.dsimilar, room.dkept);
  add_run(room.dsimilar, dread, read);
  dnc_modes_backward(a, at, ask, dask, room, ways, dread);
  dnc_content_backward(readers, after, d.memory, stride, room.reading, room.similar, room.dsimilar,
                       DncHeadSlopes<A>{dask.read_key, dask.read_strength, dask.read_mask, at.weights, dreads});
  column_access_backward(writing, kept, after, d.memory, stride, at.weights + read, dreads, dwrite, ask, dask);

  LinkArgs l = dnc_link(a, at, link);
  l.dnew = d.link, l.dnew_h = n_rows * n_rows, l.dnew_n = n_rows, l.dlink = d.link;
  l.dprecedence_new = d.precedence, l.dprecedence_h = n_rows, l.dprecedence = d.precedence;
  l.dforward = room.dways, l.dbackward = room.dways + read * a.writers;
  l.dforward_r = l.dbackward_r = written, l.dforward_h = l.dbackward_h = n_rows;
  l.dwrite = room.dwrite, l.dread = room.dread;
  for (int64_t h = 0; h < a.writers; h++)
    link_backward<A>(l, h, 0, n_rows, room.partial + h * link_partial(l, true), room.links);
  link_combine_backward<A>(l, 0, room.partial, 1);
  add_run(dwrite, room.dwrite, written);

  const AllocationHeads<A> heads(s, room.sort);
  for (int64_t h = 0; h < a.writers; h++)
    convert_run(heads.found + h * allocation_vector(s), room.free + h * n_rows, n_rows);
  dnc_write_weights_backward(a, ask, dask, room);
  s.dout = room.dfree, s.dout_h = n_rows, s.dusage = room.dusage, s.dgates = room.dgates;
  allocation_gradient<A>(s, 0, room.sort);
  for (int64_t h = 0; h < a.writers; h++) {
    const A more = room.dgates[h];
    dask.write[h] += more * ask.allocation[h], dask.allocation[h] += more * ask.write[h];
  }
  add_run(d.usage, room.dusage, n_rows);
  UsageArgs u = dnc_usage(a, at, ask, room, false);
  u.dout = room.dusage, u.dusage = d.usage, u.dwrite = a.write_gradient ? dwrite : nullptr, u.dread = dread;
  u.dfree = dask.free;
  usage_backward<A>(u, 0, room.sums);
  if (!a.write_gradient)
    for (int64_t i = 0; i < written; i++) dwrite[i] = 0;
  add_run(room.dread, dread, read);
  if (a.deallocate) {
    dnc_deallocate_backward(a, at, ask, room, before, d.memory, stride, room.dread);
    add_run(room.dextra, dread, read), add_run(room.dread, dask.free, a.readers);
  }
  dnc_content_backward(writers, before, d.memory, stride, room.writing, room.wanted, room.dwanted,
                       DncHeadSlopes<A>{dask.write_key, dask.write_strength, dask.write_mask});
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
