// location_address: w_g = g content + (1 - g) previous;  w_s[i] = sum_j shift[j] w_g[i - j];  with r = w_s / max w_s,
// l = log r and p = exp((sharpen - 1) l):  weights = r p / sum r p. Backward, with c = dweights - weights . dweights:
//
//   dsharpen = sum weights c l,  dw_s = sharpen p c / (max w_s sum r p),  dw_g[k] = sum_j shift[j] dw_s[k + j],
//   dshift[j] = sum_i dw_s[i] w_g[i - j],  dcontent = g dw_g,  dprevious = (1 - g) dw_g,
//   dgate = dw_g . (content - previous)
//
// A task is one head of one batch entry, whose rows of weights stay in the L1 or L2 cache between the passes; one
// logarithm and one exponential an element in either direction. Bytes per memory row and head: forward 2 reads, 1
// write; backward 3 reads, 2 writes. Precision: the accumulation type inside, rounded once.
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
  A *circle, *slopes, *shifted, *logarithm, *power, *taps;  // circle and slopes with `reach` beyond either end
  A gate, sharpen;
  int64_t rows, count, reach;

  MK_INLINE LocationHead(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) {
    content = static_cast<const S*>(a.content) + b * a.content_b + r * a.content_r;
    previous = static_cast<const S*>(a.previous) + b * a.previous_b + r * a.previous_r;
    gate = to_float(static_cast<const S*>(a.gate)[b * a.gate_b + r * a.gate_r]);
    sharpen = to_float(static_cast<const S*>(a.sharpen)[b * a.sharpen_b + r * a.sharpen_r]);
    rows = a.rows, count = a.taps, reach = count / 2;
    circle = static_cast<A*>(scratch), slopes = circle + rows + count + 16, shifted = slopes + rows + count + 16;
    logarithm = shifted + rows + 16, power = logarithm + rows + 16, taps = power + rows + 16;
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

template <class S>
void location_address_forward(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  LocationHead<S> head(a, b, r, scratch);
  const A largest = head.shift();
  const Sharpening<V> by(largest, head.sharpen);
  take_logarithms(head.shifted, head.rows, by, head.logarithm);
  V sum = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V mass = load<V>(head.shifted + i, part) * exp(by.above * load<V>(head.logarithm + i, part));
    store(mass, head.shifted + i, part);
    sum = sum + in_part(mass, V::zero(), part);
  });
  const A total = reduce_add(sum);
  A* stats = static_cast<A*>(a.stats) + 2 * (b * a.heads + r);
  stats[0] = largest, stats[1] = total;
  S* weights = static_cast<S*>(a.weights) + (b * a.heads + r) * a.rows;
  const V inverse = V::set1(1 / (total == 0 ? A(1) : total));
  for_each_vec<V>(head.rows,
                  [&](int64_t i, auto part) { store(load<V>(head.shifted + i, part) * inverse, weights + i, part); });
}

// dgate, dcontent and dprevious from the circle of slopes dw_s.
template <class S>
MK_INLINE void interpolation_gradients(const LocationAddressArgs& a, const LocationHead<S>& head, int64_t place) {
  using V = Vec<acc_t<S>>;
  S *dcontent = a.dcontent ? static_cast<S*>(a.dcontent) + place * a.rows : nullptr,
    *dprevious = a.dprevious ? static_cast<S*>(a.dprevious) + place * a.rows : nullptr;
  const V g = V::set1(head.gate), rest = V::set1(1 - head.gate);
  V dgate = V::zero();
  convolve<1>(head.slopes, head.taps, head.count, head.rows, [&](int64_t i, V d, auto part) {
    if (dcontent) store(g * d, dcontent + i, part);
    if (dprevious) store(rest * d, dprevious + i, part);
    const V apart = load<V>(head.content + i, part) - load<V>(head.previous + i, part);
    dgate = fma(in_part(d, V::zero(), part), apart, dgate);
  });
  if (a.dgate) static_cast<S*>(a.dgate)[place] = convert<S>::from(reduce_add(dgate));
}

template <class S>
void location_address_backward(const LocationAddressArgs& a, int64_t b, int64_t r, void* scratch) {
  using A = acc_t<S>;
  using V = Vec<A>;
  LocationHead<S> head(a, b, r, scratch);
  head.shift();
  const int64_t place = b * a.heads + r;
  const A* stats = static_cast<const A*>(a.stats) + 2 * place;
  const S* dweights = static_cast<const S*>(a.dweights) + b * a.dweights_b + r * a.dweights_r;
  const A sum = stats[1] == 0 ? A(1) : stats[1];
  const Sharpening<V> by(stats[0], head.sharpen);
  const V inverse = V::set1(1 / sum);
  take_logarithms(head.shifted, head.rows, by, head.logarithm);
  V dot = V::zero(), mass = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V ratio = load<V>(head.shifted + i, part), power = exp(by.above * load<V>(head.logarithm + i, part));
    const V weight = ratio * power * inverse;
    dot = fma(weight, load<V>(dweights + i, part), dot);
    mass = mass + in_part(weight, V::zero(), part);
    store(weight, head.shifted + i, part);
    store(select(ratio <= V::zero(), V::zero(), power), head.power + i, part);
  });
  // Below this the slope of a row of nothing but such weights would leave the range of A.
  constexpr A kLeast = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-900);
  const A largest = stats[0] < kLeast ? kLeast : stats[0];
  // The mean once more, from what the rounded one leaves: where dweights are all alike the gradients are that alone.
  const V near = V::set1(reduce_add(dot));
  V rest = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    rest = fma(load<V>(head.shifted + i, part), load<V>(dweights + i, part) - near, rest);
  });
  const A total = reduce_add(mass);
  const V centre = near + V::set1(reduce_add(rest) / (total == 0 ? A(1) : total));
  const V slope = V::set1(head.sharpen / (sum * largest));
  V dsharpen = V::zero();
  for_each_vec<V>(head.rows, [&](int64_t i, auto part) {
    const V centred = load<V>(dweights + i, part) - centre;
    dsharpen = fma(load<V>(head.shifted + i, part) * centred, load<V>(head.logarithm + i, part), dsharpen);
    store(slope * load<V>(head.power + i, part) * centred, head.slopes + head.reach + i, part);
  });
  if (a.dsharpen) static_cast<S*>(a.dsharpen)[place] = convert<S>::from(reduce_add(dsharpen));
  if (a.dshift) {
    A* dtaps = head.taps + head.count + 16;
    convolve_taps(head.circle + 2 * head.reach, head.slopes + head.reach, head.count, head.rows, dtaps);
    S* dshift = static_cast<S*>(a.dshift) + place * a.taps;
    for_each_vec<V>(head.count, [&](int64_t t, auto part) { store(load<V>(dtaps + t, part), dshift + t, part); });
  }
  close_circle(head.slopes, head.rows, head.reach);
  if (a.dcontent || a.dprevious || a.dgate) interpolation_gradients(a, head, place);
}

}  // namespace

}  // namespace mk::cpu::MK_LEVEL
