// gru_gates: r = sigmoid(xr + hr);  z = sigmoid(xz + hz);  n = tanh(xn + r hn);  h = n + z (h' - n)
//
// A task owns rows. Bytes per unit: forward reads 7 elements and writes 1; backward reads 8 and writes 7. Activations
// are computed again in backward: cheaper than keeping three gates in memory. Precision: all in the accumulation type,
// one rounding to the storage type.
#include "cpu/generic/gates.inl.h"
#include "cpu/gru_gates.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class V>
struct GruValues {
  V r, z, n, hidden;  // hidden: hn
};

// One row, from unit j on.
template <class V, class S, class Part>
MK_INLINE GruValues<V> activate(const GruGatesArgs& a, int64_t b, int64_t j, Part part) {
  const S *x = static_cast<const S*>(a.gates_input) + b * a.gates_input_b + j,
          *u = static_cast<const S*>(a.gates_hidden) + b * a.gates_hidden_b + j;
  GruValues<V> v;
  v.r = gate_sigmoid(load<V>(x, part) + load<V>(u, part));
  v.z = gate_sigmoid(load<V>(x + a.hidden, part) + load<V>(u + a.hidden, part));
  v.hidden = load<V>(u + 2 * a.hidden, part);
  v.n = gate_tanh(fma(v.r, v.hidden, load<V>(x + 2 * a.hidden, part)));
  return v;
}

template <class S>
void gru_gates_forward(const GruGatesArgs& a, int64_t row, int64_t end) {
  using V = Vec<acc_t<S>>;
  for (int64_t b = row; b < end; b++) {
    const S* state = static_cast<const S*>(a.state) + b * a.state_b;
    for_each_vec<V>(a.hidden, [&](int64_t j, auto part) {
      const GruValues<V> v = activate<V, S>(a, b, j, part);
      store(fma(v.z, load<V>(state + j, part) - v.n, v.n), static_cast<S*>(a.h) + b * a.hidden + j, part);
    });
  }
}

template <class S>
void gru_gates_backward(const GruGatesArgs& a, int64_t row, int64_t end) {
  using V = Vec<acc_t<S>>;
  const V one = V::set1(1);
  for (int64_t b = row; b < end; b++) {
    const S* state = static_cast<const S*>(a.state) + b * a.state_b;
    for_each_vec<V>(a.hidden, [&](int64_t j, auto part) {
      const GruValues<V> v = activate<V, S>(a, b, j, part);
      const V dh = load<V>(static_cast<const S*>(a.dh) + b * a.dh_b + j, part);
      const V dn = dh * (one - v.z) * (one - v.n * v.n);
      const V dz = dh * (load<V>(state + j, part) - v.n) * v.z * (one - v.z);
      const V dr = dn * v.hidden * v.r * (one - v.r);
      const auto write = [&](void* to, V last) {
        if (!to) return;
        S* out = static_cast<S*>(to) + b * 3 * a.hidden + j;
        store(dr, out, part), store(dz, out + a.hidden, part), store(last, out + 2 * a.hidden, part);
      };
      write(a.dgates_input, dn), write(a.dgates_hidden, dn * v.r);
      if (a.dstate) store(dh * v.z, static_cast<S*>(a.dstate) + b * a.hidden + j, part);
    });
  }
}

}  // namespace

const GruGatesKernels gru_gates = {MK_FLOAT_TYPES(gru_gates_forward), MK_FLOAT_TYPES(gru_gates_backward)};

}  // namespace mk::cpu::MK_LEVEL
