// The LSTM that moves the heads of a memory in a sequence op (ntm_sequence, dnc_sequence): its pointwise steps, its
// weights in the layout of the products, and their gradients. `Args` has the sizes and pointers of the op, `Place`
// those of a step.
#pragma once
#include "cpu/generic/small_products.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class To, class From>
MK_INLINE void convert_run(const From* from, To* to, int64_t n) {
  using V = Vec<acc_t<To>>;
  for_each_vec<V>(n, [&](int64_t i, auto part) { store(load<V>(from + i, part), to + i, part); });
}

template <class A>
MK_INLINE void clear(A* x, int64_t n) {
  for_each_vec<Vec<A>>(n, [&](int64_t i, auto part) { store(Vec<A>::zero(), x + i, part); });
}

// NaN stays NaN.
template <class V>
MK_INLINE V clamped(V x, double clip) {
  using A = typename V::T;
  return min(V::set1(A(clip)), max(V::set1(A(-clip)), x));
}

// `rows` rows of n elements into a matrix [height][width] at (row, column), or transposed into [width][height].
template <class S>
void pack_matrix(const void* from, int64_t stride, int64_t rows, int64_t n, void* to, int64_t row, int64_t column,
                 int64_t height, int64_t width, bool transposed) {
  acc_t<S>* out = static_cast<acc_t<S>*>(to);
  for (int64_t j = 0; j < rows; j++) {
    const S* x = static_cast<const S*>(from) + j * stride;
    if (!transposed)
      convert_run(x, out + (row + j) * width + column, n);
    else
      for (int64_t k = 0; k < n; k++) out[(column + k) * height + row + j] = to_float(x[k]);
  }
}

// The controller's matrix: [K][4H] with its bias for forward, [4H][K] for backward.
template <class S, class Args>
void pack_controller(const Args& a, bool backward) {
  const int64_t gates = 4 * a.hidden, depth = a.depth(), into = a.features + a.read();
  pack_matrix<S>(a.weight_ih, a.features, gates, a.features, a.controller, 0, 0, gates, depth, !backward);
  pack_matrix<S>(a.weight_rh, a.read(), gates, a.read(), a.controller, 0, a.features, gates, depth, !backward);
  pack_matrix<S>(a.weight_hh, a.hidden, gates, a.hidden, a.controller, 0, into, gates, depth, !backward);
  if (!backward) convert_run(static_cast<const S*>(a.bias), static_cast<acc_t<S>*>(a.controller_bias), gates);
}

// What enters the first step of row b beside its input, and the last cell where there is no step.
template <class S, class Args>
void controller_start(const Args& a, int64_t b) {
  acc_t<S>* row = static_cast<acc_t<S>*>(a.entered) + b * a.depth() + a.features;
  convert_run(static_cast<const S*>(a.reads) + b * a.read(), row, a.read());
  convert_run(static_cast<const S*>(a.h) + b * a.hidden, row + a.read(), a.hidden);
  if (!a.steps)
    convert_run(static_cast<const S*>(a.c) + b * a.hidden, static_cast<S*>(a.last_cell) + b * a.hidden, a.hidden);
}

// Gates, cell and hidden state of a row, from the sums before activation in place.
template <class S, class Args, class Place>
void controller_forward(const Args& a, int64_t t, int64_t b, const Place& at) {
  using V = Vec<acc_t<S>>;
  const int64_t n = a.hidden;
  const auto* previous = at.cell - a.batch * n;
  const S* first = static_cast<const S*>(a.c) + b * n;
  auto* h = at.next + a.features + a.read();
  S* out = static_cast<S*>(a.all_hidden) + (t * a.batch + b) * n;
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    auto* gate = at.gates + j;
    const V i = sigmoid(load<V>(gate, part)), f = sigmoid(load<V>(gate + n, part));
    const V g = tanh(load<V>(gate + 2 * n, part)), o = sigmoid(load<V>(gate + 3 * n, part));
    const V old = t ? clamped(load<V>(previous + j, part), a.clip) : load<V>(first + j, part);
    const V c = fma(f, old, i * g), now = o * tanh(c);
    store(i, gate, part), store(f, gate + n, part), store(g, gate + 2 * n, part), store(o, gate + 3 * n, part);
    store(c, at.cell + j, part), store(now, h + j, part), store(now, out + j, part);
    if (t + 1 == a.steps) store(clamped(c, a.clip), static_cast<S*>(a.last_cell) + b * n + j, part);
  });
}

// The controller of one row: from the gradient of h, the last part of `entered`, and of c to that of the gates' sums.
template <class S, class Args, class Place>
void controller_backward(const Args& a, int64_t t, int64_t b, const Place& at, const acc_t<S>* from_heads,
                         const acc_t<S>* entered, acc_t<S>* dcell) {
  using V = Vec<acc_t<S>>;
  using A = acc_t<S>;
  const int64_t n = a.hidden, place = t * a.batch + b;
  const A *carried = entered + a.features + a.read(), *previous = at.cell - a.batch * n;
  const S *first = static_cast<const S*>(a.c) + b * n,
          *more = a.dhidden ? static_cast<const S*>(a.dhidden) + place * n : nullptr;
  A* out = static_cast<A*>(a.dgates) + place * 4 * n;
  const V one = V::set1(1);
  for_each_vec<V>(n, [&](int64_t j, auto part) {
    const auto* gate = at.gates + j;
    const V i = load<V>(gate, part), f = load<V>(gate + n, part), g = load<V>(gate + 2 * n, part),
            o = load<V>(gate + 3 * n, part);
    const V cell = load<V>(at.cell + j, part), bent = tanh(cell);
    const V old = t ? clamped(load<V>(previous + j, part), a.clip) : load<V>(first + j, part);
    V dh = load<V>(carried + j, part) + load<V>(from_heads + j, part);
    if (more) dh = dh + load<V>(more + j, part);
    const V passed = select(abs(cell) > V::set1(A(a.clip)), V::zero(), load<V>(dcell + j, part));
    const V dc = fma(dh * o, one - bent * bent, passed);
    store(dc * g * i * (one - i), out + j, part), store(dc * old * f * (one - f), out + n + j, part);
    store(dc * i * (one - g * g), out + 2 * n + j, part), store(dh * bent * o * (one - o), out + 3 * n + j, part);
    store(dc * f, dcell + j, part);
  });
}

// sum[j] = sum over `count` rows of left[first + j] right, bias[j] = sum of left[first + j], for n of the columns of
// left.
template <class A>
void sum_outer(const void* left, int64_t stride, int64_t first, int64_t n, const A* right, int64_t right_stride,
               int64_t columns, int64_t count, A* sum, A* bias) {
  const A one = 1;
  clear(sum, n * columns), clear(bias, n);
  const A* rows = static_cast<const A*>(left) + first;
  add_outer(rows, stride, n, right, right_stride, count, columns, sum, columns);
  add_outer(&one, 0, 1, rows, stride, count, n, bias, n);
}

// Rows [begin, end) of the gradients of the controller's weights, dweight[0] to [3].
template <class S, class Args>
void controller_weights(const Args& a, int64_t begin, int64_t end, acc_t<S>* sum, acc_t<S>* bias) {
  const int64_t depth = a.depth();
  sum_outer(a.dgates, 4 * a.hidden, begin, end - begin, static_cast<const acc_t<S>*>(a.entered), depth, depth,
            a.steps * a.batch, sum, bias);
  const auto narrow = [&](void* to, int64_t row, int64_t n, const acc_t<S>* from) {
    if (to) convert_run(from, static_cast<S*>(to) + row * n, n);
  };
  for (int64_t j = begin; j < end; j++) {
    const acc_t<S>* row = sum + (j - begin) * depth;
    narrow(a.dweight[0], j, a.features, row), narrow(a.dweight[1], j, a.read(), row + a.features);
    narrow(a.dweight[2], j, a.hidden, row + a.features + a.read()), narrow(a.dweight[3], j, 1, bias + j - begin);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
