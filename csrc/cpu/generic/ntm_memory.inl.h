// What a step of a Neural Turing Machine does with the memory of one batch row, which lies transposed, m[w][n] with
// `stride` elements from one w to the next, so that all passes run over whole vectors of rows n.
#pragma once
#include "cpu/generic/location_head.inl.h"
#include "cpu/ntm_sequence.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The parts of a row of `heads`, or of its gradient.
template <class A>
struct NtmHeads {
  A *key, *scalars, *erase, *add, *stats;
  MK_INLINE NtmHeads(const NtmArgs& a, A* row) {
    key = row, scalars = key + a.every() * a.width, erase = scalars + a.every() * a.scalars;
    add = erase + a.writers * a.width, stats = add + a.writers * a.width;
  }
};

template <class A>
MK_INLINE A root(A x) {
  return reduce_max(sqrt(Vec<A>::set1(x)));
}

template <class A>
MK_INLINE A dot_of(const A* x, const A* y, int64_t n) {
  using V = Vec<A>;
  V sum = V::zero();
  for_each_vec<V>(n, [&](int64_t i, auto part) { sum = fma(load<V>(x + i, part), load<V>(y + i, part), sum); });
  return reduce_add(sum);
}

// log(1 + e^x), small results to full relative precision.
template <class V>
MK_INLINE V softplus(V x) {
  const V one = V::set1(1), e = exp(copysign(x, V::set1(-1))), u = one + e;
  const V tail = select(u == one, e, log(u) * (e / select(u == one, one, u - one)));
  return max(V::zero(), x) + tail;
}

// dot[h][n] = key[h] . row n, H heads, and the squared norms of the rows.
template <int H, int N, class A, class Part>
MK_INLINE void ntm_dots(const NtmArgs& a, const A* memory, int64_t stride, const A* key, A* dot, A* squares, int64_t n,
                        Part part) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  V sum[H][N], square[N];
  for (int l = 0; l < N; l++) {
    square[l] = V::zero();
    for (int h = 0; h < H; h++) sum[h][l] = V::zero();
  }
  for (int64_t w = 0; w < a.width; w++)
    for (int l = 0; l < N; l++) {
      const V m = load<V>(memory + w * stride + n + l * L, part);
      square[l] = fma(m, m, square[l]);
      for (int h = 0; h < H; h++) sum[h][l] = fma(V::set1(key[h * a.width + w]), m, sum[h][l]);
    }
  for (int l = 0; l < N; l++) {
    store(square[l], squares + n + l * L, part);
    for (int h = 0; h < H; h++) store(sum[h][l], dot + h * a.rows + n + l * L, part);
  }
}

template <int H, class A>
void ntm_dots_of(const NtmArgs& a, const A* memory, int64_t stride, const A* key, A* dot, A* squares) {
  constexpr int64_t L = Vec<A>::kLanes;
  int64_t n = 0;
  for (; n + 4 * L <= a.rows; n += 4 * L) ntm_dots<H, 4>(a, memory, stride, key, dot, squares, n, Full{});
  for (; n + L <= a.rows; n += L) ntm_dots<H, 1>(a, memory, stride, key, dot, squares, n, Full{});
  if (n < a.rows) ntm_dots<H, 1>(a, memory, stride, key, dot, squares, n, Tail{a.rows - n});
}

// Room for what addressing needs of one batch row; [A][N] but for norms [N], key_norms [A] and `room`.
template <class A>
struct NtmAddress {
  A *similar, *content, *norms, *key_norms, *room;
  static MK_INLINE int64_t size(const NtmArgs& a) {
    const int64_t taps = a.scalars - 3;
    return 2 * a.every() * a.rows + a.rows + a.every() + 48 + 5 * (a.rows + 16) + 4 * (taps + 16);
  }
  MK_INLINE NtmAddress(const NtmArgs& a, A* scratch) {
    similar = scratch, content = similar + a.every() * a.rows, norms = content + a.every() * a.rows + 16;
    key_norms = norms + a.rows + 16, room = key_norms + a.every() + 16;
  }

  // Cosines and content weights of all heads.
  MK_INLINE void weigh(const NtmArgs& a, const A* memory, int64_t stride, const NtmHeads<A>& heads) {
    using V = Vec<A>;
    const A eps = a.graves ? A(1e-6) : A(1e-16);
    int64_t h = 0;
    for (; h + 2 <= a.every(); h += 2)
      ntm_dots_of<2>(a, memory, stride, heads.key + h * a.width, similar + h * a.rows, norms);
    if (h < a.every()) ntm_dots_of<1>(a, memory, stride, heads.key + h * a.width, similar + h * a.rows, norms);
    for_each_vec<V>(
        a.rows, [&](int64_t n, auto part) { store(sqrt(load<V>(norms + n, part) + V::set1(eps)), norms + n, part); });
    for (h = 0; h < a.every(); h++) {
      const A* key = heads.key + h * a.width;
      key_norms[h] = root(dot_of(key, key, a.width) + eps);
      A *cosine = similar + h * a.rows, *out = content + h * a.rows;
      const V norm = V::set1(key_norms[h]), strength = V::set1(heads.scalars[h * a.scalars]);
      const V lowest = V::set1(-A(__builtin_inf()));
      V top = lowest, total = V::zero();
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
        const V c = load<V>(cosine + n, part) / (norm * in_part(load<V>(norms + n, part), V::set1(1), part));
        store(c, cosine + n, part);
        top = max(top, in_part(strength * c, lowest, part));
      });
      const V most = V::set1(reduce_max(top));
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
        const V power = exp(fma(strength, load<V>(cosine + n, part), -most));
        store(power, out + n, part);
        total = total + in_part(power, V::zero(), part);
      });
      const V share = V::set1(1 / reduce_add(total));
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) { store(load<V>(out + n, part) * share, out + n, part); });
    }
  }

  // The call of location_address on these weights.
  MK_INLINE LocationAddressArgs location(const NtmArgs& a, const NtmHeads<A>& heads, const A* previous) const {
    LocationAddressArgs l{};
    l.batch = 1, l.heads = a.every(), l.rows = a.rows, l.taps = a.scalars - 3;
    l.content = content, l.content_r = a.rows, l.previous = previous, l.previous_r = a.rows;
    l.gate = heads.scalars + 1, l.gate_r = a.scalars, l.sharpen = heads.scalars + 2, l.sharpen_r = a.scalars;
    l.shift = heads.scalars + 3, l.shift_r = a.scalars, l.stats = heads.stats;
    return l;
  }
};

// out = memory after the write of all heads with weights [U][N]; may be the memory itself.
template <class A>
void ntm_write(const NtmArgs& a, const A* memory, A* out, int64_t stride, const A* weights, const NtmHeads<A>& heads) {
  using V = Vec<A>;
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    for (int64_t w = 0; w < a.width; w++) {
      V kept = V::set1(1), added = V::zero();
      for (int64_t u = 0; u < a.writers; u++) {
        const V weight = load<V>(weights + u * a.rows + n, part);
        kept = kept * fma(weight, V::set1(-heads.erase[u * a.width + w]), V::set1(1));
        added = fma(weight, V::set1(heads.add[u * a.width + w]), added);
      }
      store(fma(load<V>(memory + w * stride + n, part), kept, added), out + w * stride + n, part);
    }
  });
}

// reads[r][w] = weights[r] . m[w]
template <class A>
void ntm_read(const NtmArgs& a, const A* memory, int64_t stride, const A* weights, A* reads) {
  for (int64_t r = 0; r < a.readers; r++)
    for (int64_t w = 0; w < a.width; w++)
      reads[r * a.width + w] = dot_of(weights + r * a.rows, memory + w * stride, a.rows);
}

// Gradients of reading and writing in one pass over d, the gradient of the memory after the step, which becomes that of
// the memory before it: adds to dweights [R + U][N], fills derase and dadd before their activations' slopes.
template <class A>
void ntm_access_backward(const NtmArgs& a, const A* before, const A* after, A* d, int64_t stride, const A* weights,
                         const A* dreads, A* dweights, const NtmHeads<A>& heads, const NtmHeads<A>& dheads) {
  using V = Vec<A>;
  const A* source = a.graves ? after : before;
  const int64_t first = a.readers * a.rows;
  for (int64_t w = 0; w < a.width; w++) {
    A* row = d + w * stride;
    const auto read = [&] {
      for (int64_t r = 0; r < a.readers; r++) {
        const V dread = V::set1(dreads[r * a.width + w]);
        for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
          A* to = dweights + r * a.rows + n;
          store(fma(dread, load<V>(source + w * stride + n, part), load<V>(to, part)), to, part);
          store(fma(dread, load<V>(weights + r * a.rows + n, part), load<V>(row + n, part)), row + n, part);
        });
      }
    };
    if (a.graves) read();
    for (int64_t u = 0; u < a.writers; u++) {
      const V erase = V::set1(heads.erase[u * a.width + w]), add = V::set1(heads.add[u * a.width + w]);
      V derase = V::zero(), dadd = V::zero();
      for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
        const V slope = load<V>(row + n, part), weight = load<V>(weights + first + u * a.rows + n, part);
        V others = slope * load<V>(before + w * stride + n, part);
        for (int64_t v = 0; v < a.writers; v++)
          if (v != u)
            others = others * fma(load<V>(weights + first + v * a.rows + n, part),
                                  V::set1(-heads.erase[v * a.width + w]), V::set1(1));
        A* to = dweights + first + u * a.rows + n;
        store(fma(slope, add, load<V>(to, part)) - others * erase, to, part);
        derase = derase - weight * others;
        dadd = fma(weight, slope, dadd);
      });
      dheads.erase[u * a.width + w] = reduce_add(derase), dheads.add[u * a.width + w] = reduce_add(dadd);
    }
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      V kept = load<V>(row + n, part);
      for (int64_t u = 0; u < a.writers; u++)
        kept = kept *
               fma(load<V>(weights + first + u * a.rows + n, part), V::set1(-heads.erase[u * a.width + w]), V::set1(1));
      store(kept, row + n, part);
    });
    if (!a.graves) read();
  }
}

// From dcontent [A][N], overwritten: adds to d, the gradient of the memory, and fills those of keys and strengths.
template <class A>
void ntm_similarity_backward(const NtmArgs& a, const A* memory, A* d, int64_t stride, const NtmAddress<A>& address,
                             A* dcontent, A* shrink, const NtmHeads<A>& heads, const NtmHeads<A>& dheads) {
  using V = Vec<A>;
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) { store(V::zero(), shrink + n, part); });
  for (int64_t h = 0; h < a.every(); h++) {
    const A *content = address.content + h * a.rows, *similar = address.similar + h * a.rows;
    A* slope = dcontent + h * a.rows;
    const V centre = V::set1(dot_of(slope, content, a.rows)), strength = V::set1(heads.scalars[h * a.scalars]);
    const V norm = V::set1(1 / address.key_norms[h]);
    V dstrength = V::zero(), along = V::zero();
    for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
      const V dlogit = load<V>(content + n, part) * (load<V>(slope + n, part) - centre), c = load<V>(similar + n, part);
      dstrength = fma(dlogit, c, dstrength);
      const V own = in_part(load<V>(address.norms + n, part), V::set1(1), part), scaled = dlogit * strength;
      along = fma(scaled, c, along);
      store(load<V>(shrink + n, part) + scaled * c / (own * own), shrink + n, part);
      store(scaled * norm / own, slope + n, part);
    });
    dheads.scalars[h * a.scalars] = reduce_add(dstrength);
    const A turn = reduce_add(along) / (address.key_norms[h] * address.key_norms[h]);
    for (int64_t w = 0; w < a.width; w++)
      dheads.key[h * a.width + w] = dot_of(slope, memory + w * stride, a.rows) - heads.key[h * a.width + w] * turn;
  }
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    const V less = load<V>(shrink + n, part);
    for (int64_t w = 0; w < a.width; w++) {
      V sum = load<V>(d + w * stride + n, part) - less * load<V>(memory + w * stride + n, part);
      for (int64_t h = 0; h < a.every(); h++)
        sum = fma(V::set1(heads.key[h * a.width + w]), load<V>(dcontent + h * a.rows + n, part), sum);
      store(sum, d + w * stride + n, part);
    }
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
