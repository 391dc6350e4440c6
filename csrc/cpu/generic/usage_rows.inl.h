// usage: out = (u + (1 - u)(1 - K)) F with K = prod_h (1 - w_h), F = prod_r (1 - f_r r_r); g = u + (1 - u)(1 - K), d =
// dout:
//
//   du = d F K,  dw_h = d F (1 - u) prod_{g != h}(1 - w_g),  dr_r = -d g f_r O_r,  df_r = -sum_n d g O_r r_r
//
// with O_r the product of the factors of all read heads but r, prefix times suffix: exact where a factor is zero. A
// task owns a batch entry and walks its rows once, a vector at a time. Bytes a row: forward H + R + 2 elements,
// backward 2 (H + R) + 3. Precision: the accumulation type inside, rounded once.
#pragma once
#include "cpu/usage.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class S>
struct UsageRow {
  const S *usage, *write, *read, *free;
  MK_INLINE UsageRow(const UsageArgs& a, int64_t b)
      : usage(static_cast<const S*>(a.usage) + b * a.usage_b),
        write(static_cast<const S*>(a.write) + b * a.write_b),
        read(static_cast<const S*>(a.read) + b * a.read_b),
        free(static_cast<const S*>(a.free) + b * a.free_b) {}
};

// 1 - f_r r_r at rows n and on.
template <class S, class Part>
MK_INLINE Vec<acc_t<S>> left_by_read(const UsageArgs& a, const UsageRow<S>& row, int64_t r, int64_t n, Part part) {
  using V = Vec<acc_t<S>>;
  return V::set1(1) - V::set1(to_float(row.free[r])) * load<V>(row.read + r * a.read_r + n, part);
}

template <class S>
void usage_forward(const UsageArgs& a, int64_t b) {
  using V = Vec<acc_t<S>>;
  const UsageRow<S> row(a, b);
  S* out = static_cast<S*>(a.out) + b * a.rows;
  const V one = V::set1(1);
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    V kept = one, left = one;
    for (int64_t h = 0; h < a.write_heads; h++) kept = kept * (one - load<V>(row.write + h * a.write_h + n, part));
    for (int64_t r = 0; r < a.read_heads; r++) left = left * left_by_read(a, row, r, n, part);
    const V usage = load<V>(row.usage + n, part);
    store(fma(one - usage, one - kept, usage) * left, out + n, part);
  });
}

// The product of `count` factors; factors and the products before each stay in `room`, [2][count][kLanes].
template <class V, class Factor>
MK_INLINE V multiply(int64_t count, typename V::T* room, const Factor& factor) {
  V product = V::set1(1);
  for (int64_t k = 0; k < count; k++) {
    const V f = factor(k);
    f.store(room + k * V::kLanes);
    product.store(room + (count + k) * V::kLanes);
    product = product * f;
  }
  return product;
}

// use(k, seed times all factors but k), for every k.
template <class V, class Use>
MK_INLINE void others(int64_t count, V seed, const typename V::T* room, const Use& use) {
  for (int64_t k = count - 1; k >= 0; k--) {
    use(k, V::load(room + (count + k) * V::kLanes) * seed);
    seed = seed * V::load(room + k * V::kLanes);
  }
}

template <class S>
void usage_backward(const UsageArgs& a, int64_t b, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  const UsageRow<S> row(a, b);
  const S* dout = static_cast<const S*>(a.dout) + b * a.dout_b;
  A *write_room = static_cast<A*>(scratch), *read_room = write_room + 2 * a.write_heads * L,
    *sums = read_room + 2 * a.read_heads * L;
  for (int64_t r = 0; r < a.read_heads; r++) V::zero().store(sums + r * L);
  const V one = V::set1(1);
  for_each_vec<V>(a.rows, [&](int64_t n, auto part) {
    const V d = load<V>(dout + n, part), usage = load<V>(row.usage + n, part);
    const V kept = multiply<V>(a.write_heads, write_room,
                               [&](int64_t h) { return one - load<V>(row.write + h * a.write_h + n, part); });
    const V left = multiply<V>(a.read_heads, read_room, [&](int64_t r) { return left_by_read(a, row, r, n, part); });
    const V dgrown = d * left, grown = fma(one - usage, one - kept, usage);
    if (a.dusage) store(dgrown * kept, static_cast<S*>(a.dusage) + b * a.rows + n, part);
    if (a.dwrite)
      others<V>(a.write_heads, dgrown * (one - usage), write_room, [&](int64_t h, V value) {
        store(value, static_cast<S*>(a.dwrite) + (b * a.write_heads + h) * a.rows + n, part);
      });
    if (a.dread || a.dfree)
      others<V>(a.read_heads, -(d * grown), read_room, [&](int64_t r, V value) {
        if (a.dread)
          store(value * V::set1(to_float(row.free[r])), static_cast<S*>(a.dread) + (b * a.read_heads + r) * a.rows + n,
                part);
        const V sum = fma(value, load<V>(row.read + r * a.read_r + n, part), V::load(sums + r * L));
        in_part(sum, V::load(sums + r * L), part).store(sums + r * L);
      });
  });
  if (a.dfree)
    for (int64_t r = 0; r < a.read_heads; r++)
      static_cast<S*>(a.dfree)[b * a.read_heads + r] = convert<S>::from(reduce_add(V::load(sums + r * L)));
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
