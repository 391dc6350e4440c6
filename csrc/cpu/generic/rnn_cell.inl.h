// The pointwise step of rnn: h = tanh(z), or max(z, 0)
#pragma once
#include <limits>

#include "cpu/generic/gates.inl.h"
#include "cpu/generic/recurrent_state.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

struct RnnCell {
  static constexpr Cell kCell = Cell::rnn;

  template <class T, class V, class Part>
  static MK_INLINE void forward(const RecurrentForward& f, const acc_t<T>* z, const acc_t<T>*, V&, V& h, T*, int64_t,
                                Part) {
    h = f.relu ? max(V::zero(), V::load(z)) : tanh_for<T>(V::load(z));
  }

  template <class T, class P, class Part>
  static MK_INLINE void backward(const RecurrentBackward& f, const GradientRow<T, P>& row, int64_t at, int64_t,
                                 Part part) {
    using V = Vec<acc_t<T>>;
    const V h = load<V>(row.state + at, part), dh = row.arriving(at, part);
    // As in torch, only units at 0 are dead: one that is NaN is not. The bound is no denormal number, which threads
    // that flush those take for 0.
    const V least = V::set1(std::numeric_limits<acc_t<T>>::min());
    store(f.relu ? select(h < least, V::zero(), dh) : dh * tanh_slope(h), row.dz + at, part);
  }
};

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
