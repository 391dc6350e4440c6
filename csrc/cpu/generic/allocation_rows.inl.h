// allocation: s = eps + (1 - eps) u; in the order phi of ascending s, of equal rows the lowest first,
//
//   a_j = (1 - s_j) P_j,  P_j = prod_{i<j} s_i,    ds_j = P_j (Q_j - da_j),  Q_j = sum_{k>j} da_k (1 - s_k)
//   prod_{j<i<k} s_i
//
// where Q runs backwards, Q_j = da_{j+1} (1 - s_{j+1}) + s_{j+1} Q_{j+1}: no division, so s may be 0. With gates heads
// take turns: u of the next head is u + (1 - u) g a. A task owns a batch entry. The order is found by a stable radix
// sort of the bits of s, a byte at a time; passes in which all bytes are equal are left out.
// Backward computes all of forward again: cheaper than keeping H orders. Precision: the accumulation type inside.
#pragma once
#include "cpu/allocation.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Unsigned numbers in the order of the values: -0 equals 0, NaN comes last.
MK_INLINE uint32_t sort_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f), sign = bits >> 31;
  return x != x ? ~uint32_t(0) : bits ^ ((0 - sign) | uint32_t(1) << 31);
}
MK_INLINE uint64_t sort_key(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0), sign = bits >> 63;
  return x != x ? ~uint64_t(0) : bits ^ ((0 - sign) | uint64_t(1) << 63);
}
template <class A>
struct SortKey {
  using type = decltype(sort_key(A()));
};

template <class K>
void insertion_sort(K* key, int32_t* order, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const K k = key[i];
    const int32_t index = order[i];
    int64_t j = i;
    for (; j > 0 && key[j - 1] > k; j--) key[j] = key[j - 1], order[j] = order[j - 1];
    key[j] = k, order[j] = index;
  }
}

// s of one row; written as the reference does it, so that rows tie where they tie there.
template <class A>
struct Usage {
  A eps, rest;
  MK_INLINE explicit Usage(double e) : eps(A(e)), rest(A(1 - e)) {}
  MK_INLINE A operator()(A u) const { return eps + rest * u; }
};

// The order by counting how many rows come before each, a vector of rows at a time: n^2 / kLanes steps without a
// branch. False, and nothing done, where one is NaN.
template <class A>
bool order_by_counting(const A* u, int64_t n, Usage<A> least, A* s, int32_t* order) {
  using V = Vec<A>;
  constexpr int64_t L = V::kLanes;
  bool ordered = true;
  for (int64_t i = 0; i < n; i++) s[i] = least(u[i]), ordered &= s[i] == s[i];
  if (!ordered) return false;
  const V one = V::set1(1);
  for (int64_t first = 0; first < n; first += L) {
    const int64_t lanes = n - first < L ? n - first : L;
    const V own = V::load(s + first, lanes);
    V before = V::zero();
    for (int64_t j = 0; j < first; j++) before = before + select(V::set1(s[j]) <= own, one, V::zero());
    for (int64_t j = first; j < first + lanes; j++) {
      const V other = V::set1(s[j]);
      const auto earlier = (other == own) & !V::first_lanes(j - first + 1);
      before = before + select((other < own) | earlier, one, V::zero());
    }
    for (int64_t j = first + lanes; j < n; j++) before = before + select(V::set1(s[j]) < own, one, V::zero());
    alignas(64) A places[L];
    before.store(places);
    for (int64_t l = 0; l < lanes; l++) order[int64_t(places[l])] = int32_t(first + l);
  }
  return true;
}

// The rows by ascending s, in one of the two halves of `room`.
template <class A>
const int32_t* stable_order(const A* u, int64_t n, Usage<A> least, int64_t padded, void* room) {
  using K = typename SortKey<A>::type;
  constexpr int64_t kFew = 48, kCounted = 8 * Vec<A>::kLanes, kBytes = int64_t(sizeof(K));
  K *key = static_cast<K*>(room), *other_key = key + padded;
  int32_t *order = reinterpret_cast<int32_t*>(other_key + padded), *other_order = order + padded;
  if (n > Vec<A>::kLanes && n <= kCounted && order_by_counting(u, n, least, static_cast<A*>(room), order)) return order;
  for (int64_t i = 0; i < n; i++) key[i] = sort_key(least(u[i])), order[i] = int32_t(i);
  if (n <= kFew) {
    insertion_sort(key, order, n);
    return order;
  }
  int32_t counts[kBytes][256];
  for (auto& of_byte : counts)
    for (int32_t& count : of_byte) count = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t byte = 0; byte < kBytes; byte++) counts[byte][key[i] >> 8 * byte & 255]++;
  for (int64_t byte = 0; byte < kBytes; byte++) {
    int32_t* place = counts[byte];
    if (place[key[0] >> 8 * byte & 255] == n) continue;
    for (int32_t i = 0, first = 0; i < 256; i++) {
      const int32_t count = place[i];
      place[i] = first, first += count;
    }
    for (int64_t i = 0; i < n; i++) {
      const int32_t to = place[key[i] >> 8 * byte & 255]++;
      other_key[to] = key[i], other_order[to] = order[i];
    }
    K* const sorted_key = other_key;
    int32_t* const sorted_order = other_order;
    other_key = key, other_order = order, key = sorted_key, order = sorted_order;
  }
  return order;
}

// Products far below what a sum of shares resolves count as 0: denormal numbers, which they and all gradients from them
// would turn to, cost a hundred times as much.
MK_INLINE bool vanished(float product) { return __builtin_fabsf(product) < 1e-30f; }
MK_INLINE bool vanished(double product) { return __builtin_fabs(product) < 1e-290; }

// body(row, its s, the product of all s before it), in order.
template <class A, class Body>
MK_INLINE void each_product(const A* u, const int32_t* order, int64_t n, Usage<A> least, const Body& body) {
  A product = 1;
  int64_t j = 0;
  for (; j < n && !vanished(product); j++) {
    const A s = least(u[order[j]]);
    body(j, s, product);
    product *= s;
  }
  for (; j < n; j++) body(j, least(u[order[j]]), A(0));
}

template <class A>
void allocate(const A* u, const int32_t* order, int64_t n, Usage<A> least, A* out) {
  each_product(u, order, n, least, [&](int64_t j, A s, A product) { out[order[j]] = (1 - s) * product; });
}

// The usage that the next head sees.
template <class A>
MK_INLINE void fill(const A* u, const A* a, A gate, int64_t n, A* next) {
  using V = Vec<A>;
  const V one = V::set1(1), g = V::set1(gate);
  for_each_vec<V>(n, [&](int64_t i, auto part) {
    const V usage = load<V>(u + i, part);
    store(usage + (one - usage) * (g * load<V>(a + i, part)), next + i, part);
  });
}

template <class S>
MK_INLINE const S* load_usage(const AllocationArgs& a, int64_t b, acc_t<S>* to) {
  using V = Vec<acc_t<S>>;
  const S* usage = static_cast<const S*>(a.usage) + b * a.usage_b;
  for_each_vec<V>(a.rows, [&](int64_t i, auto part) { store(load<V>(usage + i, part), to + i, part); });
  return a.gates ? static_cast<const S*>(a.gates) + b * a.gates_b : nullptr;
}

template <class S>
void allocation_forward(const AllocationArgs& a, int64_t b, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const int64_t n = a.rows, padded = allocation_vector(a);
  A *u = static_cast<A*>(scratch), *found = u + padded;
  void* room = found + padded;
  const Usage<A> least(a.eps);
  const S* gates = load_usage<S>(a, b, u);
  for (int64_t h = 0; h < a.heads; h++) {
    allocate(u, stable_order(u, n, least, padded, room), n, least, found);
    S* out = static_cast<S*>(a.out) + (b * a.heads + h) * n;
    for_each_vec<V>(n, [&](int64_t i, auto part) { store(load<V>(found + i, part), out + i, part); });
    if (h + 1 < a.heads) fill(u, found, A(to_float(gates[h])), n, u);
  }
}

// du += gradient of one head's allocation, from its da; `before` holds the products P.
template <class A>
void allocate_backward(const A* u, const A* da, const int32_t* order, int64_t n, Usage<A> least, A* before, A* du) {
  A later = 0;
  each_product(u, order, n, least, [&](int64_t j, A, A product) { before[j] = product; });
  for (int64_t j = n - 1; j >= 0; j--) {
    const int32_t i = order[j];
    const A s = least(u[i]), d = da[i];
    du[i] += least.rest * (before[j] * (later - d));
    later = d * (1 - s) + s * later;
  }
}

// The scratch of backward: usage, order and allocation of every head, the gradient of usage, the products.
template <class A>
struct AllocationHeads {
  A *u, *found, *du, *before;
  int32_t* orders;
  void* room;
  MK_INLINE AllocationHeads(const AllocationArgs& a, void* scratch) {
    const int64_t padded = allocation_vector(a);
    u = static_cast<A*>(scratch), found = u + a.heads * padded, du = found + a.heads * padded, before = du + padded;
    orders = reinterpret_cast<int32_t*>(before + padded), room = orders + a.heads * padded;
  }
};

// Usage, order and allocation of every head; the last allocation only with `all`.
template <class S>
void allocation_replay(const AllocationArgs& a, int64_t b, void* scratch, bool all) {
  using A = acc_t<S>;
  const AllocationHeads<A> of(a, scratch);
  const int64_t n = a.rows, padded = allocation_vector(a);
  const Usage<A> least(a.eps);
  const S* gates = load_usage<S>(a, b, of.u);
  for (int64_t h = 0; h < a.heads; h++) {
    const int32_t* order = stable_order(of.u + h * padded, n, least, padded, of.room);
    for (int64_t j = 0; j < n; j++) of.orders[h * padded + j] = order[j];
    const bool last = h + 1 == a.heads;
    if (all || !last) allocate(of.u + h * padded, order, n, least, of.found + h * padded);
    if (!last) fill(of.u + h * padded, of.found + h * padded, A(to_float(gates[h])), n, of.u + (h + 1) * padded);
  }
}

// From what allocation_replay left in the scratch.
template <class S>
void allocation_gradient(const AllocationArgs& a, int64_t b, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  const AllocationHeads<A> of(a, scratch);
  const int64_t n = a.rows, padded = allocation_vector(a);
  const Usage<A> least(a.eps);
  A* const du = of.du;
  const S* gates = a.gates ? static_cast<const S*>(a.gates) + b * a.gates_b : nullptr;
  for (int64_t i = 0; i < n; i++) du[i] = 0;
  for (int64_t h = a.heads - 1; h >= 0; h--) {
    // From here on `found` of this head holds da: its own gradient and what comes back through the next head's usage.
    const S* dout = static_cast<const S*>(a.dout) + b * a.dout_b + h * a.dout_h;
    A *da = of.found + h * padded, *usage = of.u + h * padded;
    const bool last = h + 1 == a.heads;
    const V gate = V::set1(last ? A(0) : A(to_float(gates[h]))), one = V::set1(1);
    V dgate = V::zero();
    for_each_vec<V>(n, [&](int64_t i, auto part) {
      V d = load<V>(dout + i, part);
      if (!last) {
        const V back = load<V>(du + i, part), allocated = load<V>(da + i, part),
                through = back * (one - load<V>(usage + i, part));
        dgate = in_part(fma(through, allocated, dgate), dgate, part);
        d = fma(through, gate, d);
        store(back * (one - gate * allocated), du + i, part);
      }
      store(d, da + i, part);
    });
    if (a.dgates) static_cast<S*>(a.dgates)[b * a.heads + h] = convert<S>::from(reduce_add(dgate));
    allocate_backward(usage, da, of.orders + h * padded, n, least, of.before, du);
  }
  if (!a.dusage) return;
  S* dusage = static_cast<S*>(a.dusage) + b * n;
  for_each_vec<V>(n, [&](int64_t i, auto part) { store(load<V>(du + i, part), dusage + i, part); });
}

template <class S>
void allocation_backward(const AllocationArgs& a, int64_t b, void* scratch) {
  allocation_replay<S>(a, b, scratch, false);
  allocation_gradient<S>(a, b, scratch);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
