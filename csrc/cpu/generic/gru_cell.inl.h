// The pointwise step of gru: r = sigmoid(zr);  z = sigmoid(zz);  n = tanh(xn + r hn);  h = n + z (h' - n)
#pragma once
#include "cpu/generic/gates.inl.h"
#include "cpu/generic/recurrent_state.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

struct GruCell {
  static constexpr Cell kCell = Cell::gru;

  // New h (the carry too) of one vector of units; z holds zr, zz and hn from its second vector on, x starts with xn.
  template <class T, class V, class Part>
  static MK_INLINE void forward(const RecurrentForward&, const acc_t<T>* z, const acc_t<T>* x, V& carry, V& h, T* gates,
                                int64_t width, Part part) {
    const V r = sigmoid_for<T>(V::load(z + V::kLanes)), keep = sigmoid_for<T>(V::load(z + 2 * V::kLanes));
    const V hn = V::load(z + 3 * V::kLanes), n = tanh_for<T>(fma(r, hn, V::load(x)));
    h = carry = fma(keep, carry - n, n);
    if (!gates) return;
    store(r, gates, part), store(keep, gates + width, part);
    store(n, gates + 2 * width, part), store(hn, gates + 3 * width, part);
  }

  template <class T, class P, class Part>
  static MK_INLINE void backward(const RecurrentBackward&, const GradientRow<T, P>& row, int64_t at, int64_t width,
                                 Part part) {
    using A = acc_t<T>;
    using V = Vec<A>;
    const T* gate = row.gates + at;
    const V r = load<V>(gate, part), keep = load<V>(gate + width, part), n = load<V>(gate + 2 * width, part);
    const V hn = load<V>(gate + 3 * width, part), one = V::set1(A(1));
    const V old = row.old ? load<V>(row.old + at, part) : V::zero();
    const V dh = row.arriving(at, part), dn = dh * (one - keep) * tanh_slope(n);
    P* dz = row.dz + at;
    store(dn, dz, part);
    store(dn * hn * r * (one - r), dz + width, part);
    store(dh * (old - n) * keep * (one - keep), dz + 2 * width, part);
    store(dn * r, dz + 3 * width, part);
    (dh * keep).store(row.dh + at);
  }
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
