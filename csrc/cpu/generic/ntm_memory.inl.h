// How a step of a Neural Turing Machine addresses the memory of one batch row (column_memory.inl.h).
#pragma once
#include "cpu/generic/column_memory.inl.h"
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

// Room for what addressing needs of one batch row; [A][N] but for norms [N], key_norms [A] and `room`.
template <class A>
struct NtmAddress {
  A *similar, *content, *norms, *key_norms, *room;
  static MK_INLINE int64_t size(const NtmArgs& a) {
    return 2 * a.every() * a.rows + a.rows + a.every() + 48 + location_scratch(a.rows, a.scalars - 3);
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
      column_dots_of<2>(a, memory, stride, heads.key + h * a.width, similar + h * a.rows, norms);
    if (h < a.every()) column_dots_of<1>(a, memory, stride, heads.key + h * a.width, similar + h * a.rows, norms);
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
    l.shift = heads.scalars + 3, l.shift_r = a.scalars, l.stats = heads.stats, l.floor = a.graves ? 0 : 1e-16;
    return l;
  }
};

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
