// location_address: w_g = g content + (1 - g) previous;  w_s[i] = sum_j shift[j] w_g[i - j];  with r = w_s / max w_s,
// l = log r and p = exp((sharpen - 1) l):  weights = r p / sum r p. Backward, with c = dweights - weights . dweights:
//
//   dsharpen = sum weights c l,  dw_s = sharpen weights c / (max w_s r),  dw_g[k] = sum_j shift[j] dw_s[k + j],
//   dshift[j] = sum_i dw_s[i] w_g[i - j],  dcontent = g dw_g,  dprevious = (1 - g) dw_g,
//   dgate = dw_g . (content - previous)
//
// With a floor f the sum is that of r p plus f / max w_s^sharpen: weights lose the share of it, and
// dsharpen gains log(max w_s) sum weights c.
//
// A task is one head of one batch entry, whose rows of weights stay in the L1 or L2 cache between the passes. An
// element takes one logarithm and one exponential forward, one logarithm and one division backward, where the weights
// of halves, which were rounded, are made once more. Bytes per memory row and head: forward 2 reads, 1 write; backward
// 4 reads, 2 writes. Precision: the accumulation type inside, rounded once.
#pragma once
#include "cpu/location_address.h"

#include "cpu/generic/circle.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class S>
struct LocationHead {
  using A = acc_t<S>;
  using V = Vec<A>;
  const S *content, *previous;
  A *circle, *slopes, *shifted, *function, *taps, *dtaps;  // circle and slopes with `reach` beyond either end
  A gate, sharpen;
  int64_t place, rows, count, reach;

  MK_INLINE LocationHead(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) : place(b * a.heads + r) {
    content = static_cast<const S*>(a.content) + b * a.content_b + r * a.content_r;
    previous = static_cast<const S*>(a.previous) + b * a.previous_b + r * a.previous_r;
    gate = to_float(static_cast<const S*>(a.gate)[b * a.gate_b + r * a.gate_r]);
    sharpen = to_float(static_cast<const S*>(a.sharpen)[b * a.sharpen_b + r * a.sharpen_r]);
    rows = a.rows, count = a.taps, reach = count / 2;
    // Rows start with a line of the cache: a vector across two is read and written at half the speed.
    A* line = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    const int64_t step = location_row(rows, count), margin = 15 - (reach + 15) % 16;
    circle = line + margin, slopes = circle + step, shifted = line + 2 * step, function = shifted + step;
    taps = function + step, dtaps = taps + location_row(0, count);
    widen_rows(static_cast<const S*>(a.shift) + b * a.shift_b + r * a.shift_r, 0, 1, count, taps);
  }

  // -> the largest shifted weight.
  MK_INLINE A shift() {
    const V g = V::set1(gate), rest = V::set1(1 - gate);
    for_each_vec<V>(rows, [&](int64_t i, auto part) {
      store(fma(g, load<V>(content + i, part), rest * load<V>(previous + i, part)), circle + reach + i, part);
    });
    close_circle(circle, rows, reach);
    return shift_row(circle, taps, count, rows, shifted);
  }
};

// The floor over the largest weight's power.
template <class A>
MK_INLINE A floor_share(const LocationAddressArgs& a, A largest, A sharpen) {
  using V = Vec<A>;
  if (a.floor == 0) return 0;
  return reduce_max(exp(log(V::set1(A(a.floor))) - V::set1(sharpen) * log(V::set1(largest))));
}

template <class S>
void location_address_forward(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  LocationHead<S> head(a, b, r, scratch);
  const A largest = head.shift();
  const Sharpening<V> by(largest, head.sharpen);
  take_logarithms(head.shifted, head.rows, by, head.function);
  V sum = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V mass = load<V>(head.shifted + i, part) * exp(by.above * load<V>(head.function + i, part));
    store(mass, head.shifted + i, part);
    sum = sum + in_part(mass, V::zero(), part);
  });
  const A total = reduce_add(sum) + floor_share<A>(a, largest, head.sharpen);
  A* stats = static_cast<A*>(a.stats) + 2 * head.place;
  stats[0] = largest, stats[1] = total;
  S* weights = static_cast<S*>(a.weights) + head.place * a.rows;
  const V inverse = V::set1(1 / (total == 0 ? A(1) : total));
  for_each_vec<V>(head.rows,
                  [&](int64_t i, auto part) { store(load<V>(head.shifted + i, part) * inverse, weights + i, part); });
}

// dgate, dcontent and dprevious from the circle of slopes dw_s.
template <class S>
MK_INLINE void interpolation_gradients(const LocationAddressArgs& a, const LocationHead<S>& head) {
  using V = Vec<acc_t<S>>;
  S *dcontent = a.dcontent ? static_cast<S*>(a.dcontent) + head.place * a.rows : nullptr,
    *dprevious = a.dprevious ? static_cast<S*>(a.dprevious) + head.place * a.rows : nullptr;
  const V g = V::set1(head.gate), rest = V::set1(1 - head.gate);
  V dgate = V::zero();
  convolve<1>(head.slopes, head.taps, head.count, head.rows, [&](int64_t i, V d, auto part) {
    if (dcontent) store(g * d, dcontent + i, part);
    if (dprevious) store(rest * d, dprevious + i, part);
    const V apart = load<V>(head.content + i, part) - load<V>(head.previous + i, part);
    dgate = fma(in_part(d, V::zero(), part), apart, dgate);
  });
  if (a.dgate) static_cast<S*>(a.dgate)[head.place] = convert<S>::from(reduce_add(dgate));
}

// for_each_vec, with 0 and 1 in turn: the terms of one sum wait for each other, those of two only half as long.
template <class V, class Body>
MK_INLINE void for_each_in_turn(int64_t n, const Body& body) {
  constexpr int64_t L = V::kLanes;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) body(i, 0, Full{}), body(i + L, 1, Full{});
  if (i + L <= n) body(i, 0, Full{}), i += L;
  if (i < n) body(i, 1, Tail{n - i});
}

// weights . dweights, over the sum of weights, which is made here.
template <class S, class A>
MK_INLINE A mean_slope(const A* weights, const S* dweights, int64_t rows, A& total) {
  using V = Vec<A>;
  V dot[2] = {V::zero(), V::zero()}, mass[2] = {V::zero(), V::zero()}, rest[2] = {V::zero(), V::zero()};
  for_each_in_turn<V>(rows, [&](int64_t i, int turn, auto part) {
    const V weight = load<V>(weights + i, part);
    dot[turn] = fma(weight, load<V>(dweights + i, part), dot[turn]), mass[turn] = mass[turn] + weight;
  });
  // The mean once more, from what the rounded one leaves: where dweights are all alike the gradients are that alone.
  const A near = reduce_add(dot[0] + dot[1]);
  total = reduce_add(mass[0] + mass[1]);
  for_each_in_turn<V>(rows, [&](int64_t i, int turn, auto part) {
    rest[turn] = fma(load<V>(weights + i, part), load<V>(dweights + i, part) - V::set1(near), rest[turn]);
  });
  return near + reduce_add(rest[0] + rest[1]) / (total == 0 ? A(1) : total);
}

// The weights of a head before they were rounded to S.
template <class S>
MK_INLINE const acc_t<S>* exact_weights(const LocationAddressArgs& a, const LocationHead<S>& head,
                                        const Sharpening<Vec<acc_t<S>>>& by, Vec<acc_t<S>> inverse) {
  using V = Vec<acc_t<S>>;
  if constexpr (sizeof(S) == sizeof(acc_t<S>)) return static_cast<const S*>(a.weights) + head.place * a.rows;
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V ratio = by.ratio(load<V>(head.shifted + i, part));
    const auto positive = !(ratio <= V::zero());
    const V power = exp(by.above * log(select(positive, ratio, V::set1(1))));
    store(select(positive, ratio, V::zero()) * power * inverse, head.function + i, part);
  });
  return head.function;
}

// The circle of slopes dw_s; -> dsharpen.
template <class S>
MK_INLINE acc_t<S> sharpening_gradients(const LocationAddressArgs& a, const LocationHead<S>& head, const S* dweights) {
  using A = acc_t<S>;
  using V = Vec<A>;
  // Below this the slope of a row of nothing but such weights would leave the range of A, and a weight lacks digits.
  constexpr A kLeast = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-900);
  const A* stats = static_cast<const A*>(a.stats) + 2 * head.place;
  const Sharpening<V> by(stats[0], head.sharpen);
  const V inverse = V::set1(1 / (stats[1] == 0 ? A(1) : stats[1]));
  const A* weights = exact_weights(a, head, by, inverse);
  A mass = 0, mean = mean_slope(weights, dweights, head.rows, mass);
  if (a.floor != 0) mean *= mass;  // else the mass is 1 but for rounding
  const V centre = V::set1(mean);
  const V slope = V::set1(head.sharpen / (stats[0] < kLeast ? kLeast : stats[0]));
  V dsharpen = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V ratio = by.ratio(load<V>(head.shifted + i, part)), weight = load<V>(weights + i, part);
    const auto positive = !(ratio <= V::zero());
    const V base = select(positive, ratio, V::set1(1)), logarithm = log(base);
    V power = select(positive, weight / base, V::zero());  // over the sum
    const auto small = base < V::set1(kLeast);
    if (any(small)) power = select(small, exp(by.above * logarithm) * inverse, power);
    const V centred = load<V>(dweights + i, part) - centre;
    dsharpen = fma(weight * centred, logarithm, dsharpen);
    store(slope * power * centred, head.slopes + head.reach + i, part);
  });
  const A lost = a.floor == 0 ? A(0) : reduce_max(log(V::set1(stats[0]))) * mean * (1 - mass);
  return reduce_add(dsharpen) + lost;
}

template <class S>
void location_address_backward(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  LocationHead<S> head(a, b, r, scratch);
  head.shift();
  const S* dweights = static_cast<const S*>(a.dweights) + b * a.dweights_b + r * a.dweights_r;
  const A dsharpen = sharpening_gradients(a, head, dweights);
  if (a.dsharpen) static_cast<S*>(a.dsharpen)[head.place] = convert<S>::from(dsharpen);
  if (a.dshift) {
    convolve_taps(head.circle + 2 * head.reach, head.slopes + head.reach, head.count, head.rows, head.dtaps);
    S* dshift = static_cast<S*>(a.dshift) + head.place * a.taps;
    for_each_vec<V>(head.count, [&](int64_t t, auto part) { store(load<V>(head.dtaps + t, part), dshift + t, part); });
  }
  close_circle(head.slopes, head.rows, head.reach);
  if (a.dcontent || a.dprevious || a.dgate) interpolation_gradients(a, head);
}

}  // namespace

}  // namespace mk::cpu::MK_LEVEL
