// The pointwise step of lstm: c = sigmoid(f) c' + sigmoid(i) tanh(g);  h = sigmoid(o) tanh(c)
#pragma once
#include "cpu/generic/gates.inl.h"
#include "cpu/generic/recurrent_state.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

struct LstmCell {
  static constexpr Cell kCell = Cell::lstm;

  // New c (the carry) and h of one vector of units, from z of its gates; the gates where training needs them.
  template <class T, class V, class Part>
  static MK_INLINE void forward(const RecurrentForward&, const acc_t<T>* z, const acc_t<T>*, V& c, V& h, T* gates,
                                int64_t width, Part part) {
    const V i = sigmoid_for<T>(V::load(z)), forget = sigmoid_for<T>(V::load(z + V::kLanes));
    const V g = tanh_for<T>(V::load(z + 2 * V::kLanes)), o = sigmoid_for<T>(V::load(z + 3 * V::kLanes));
    c = fma(forget, c, i * g), h = o * tanh_for<T>(c);
    if (!gates) return;
    store(i, gates, part), store(forget, gates + width, part);
    store(g, gates + 2 * width, part), store(o, gates + 3 * width, part);
  }

  template <class T, class P, class Part>
  static MK_INLINE void backward(const RecurrentBackward&, const GradientRow<T, P>& row, int64_t at, int64_t width,
                                 Part part) {
    using A = acc_t<T>;
    using V = Vec<A>;
    const T* gate = row.gates + at;
    const V i = load<V>(gate, part), forget = load<V>(gate + width, part), g = load<V>(gate + 2 * width, part);
    const V o = load<V>(gate + 3 * width, part), one = V::set1(A(1));
    const V old = row.old ? load<V>(row.old + at, part) : V::zero();
    const V dh = row.arriving(at, part), tanh_c = tanh_for<T>(load<V>(row.state + at, part));
    V dc = V::load(row.dc + at);
    if (row.dcells) dc = dc + load<V>(row.dcells + at, part);
    dc = fma(dh * o, tanh_slope(tanh_c), dc);
    P* dz = row.dz + at;
    store(dc * g * i * (one - i), dz, part);
    store(dc * old * forget * (one - forget), dz + width, part);
    store(dc * i * tanh_slope(g), dz + 2 * width, part);
    store(dh * tanh_c * o * (one - o), dz + 3 * width, part);
    (dc * forget).store(row.dc + at);
  }
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
