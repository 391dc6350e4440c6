// lstm_gates: c = sigmoid(zf + pf c') c' + sigmoid(zi + pi c') tanh(zg);  h = sigmoid(zo + po c) tanh(c)
//
// A task owns rows (forward) or a block of rows or columns (backward). Bytes per cell: forward reads 5 elements and
// writes 2; backward reads up to 7 and writes 5. Activations are computed again in backward: cheaper than keeping four
// gates in memory. Precision: all in the accumulation type, one rounding to the storage type; dpeephole is summed over
// rows in their order.
#include "cpu/generic/gates.inl.h"
#include "cpu/lstm_gates.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class V>
struct GateValues {
  V i, f, g, o, c, tanh_c;
};
template <class V>
struct Peephole {
  V i, f, o;
};

template <class V, class S, class Part>
MK_INLINE Peephole<V> load_peephole(const LstmGatesArgs& a, int64_t j, Part part) {
  if (!a.peephole) return {V::zero(), V::zero(), V::zero()};
  const S* p = static_cast<const S*>(a.peephole) + j;
  return {load<V>(p, part), load<V>(p + a.peephole_r, part), load<V>(p + 2 * a.peephole_r, part)};
}

template <class V, class S, class Part>
MK_INLINE GateValues<V> activate(const LstmGatesArgs& a, int64_t b, int64_t j, const Peephole<V>& p, V old, Part part) {
  const S* z = static_cast<const S*>(a.gates) + b * a.gates_b + j;
  V zi = load<V>(z, part), zf = load<V>(z + a.hidden, part), zo = load<V>(z + 3 * a.hidden, part);
  if (a.peephole) zi = fma(p.i, old, zi), zf = fma(p.f, old, zf);
  GateValues<V> v;
  v.i = gate_sigmoid(zi), v.f = gate_sigmoid(zf), v.g = gate_tanh(load<V>(z + 2 * a.hidden, part));
  v.c = fma(v.f, old, v.i * v.g);
  v.tanh_c = gate_tanh(v.c);
  v.o = gate_sigmoid(a.peephole ? fma(p.o, v.c, zo) : zo);
  return v;
}

template <class S>
void lstm_gates_forward(const LstmGatesArgs& a, int64_t row, int64_t end) {
  using V = Vec<acc_t<S>>;
  for (int64_t b = row; b < end; b++) {
    const S* cell = static_cast<const S*>(a.cell) + b * a.cell_b;
    for_each_vec<V>(a.hidden, [&](int64_t j, auto part) {
      const GateValues<V> v = activate<V, S>(a, b, j, load_peephole<V, S>(a, j, part), load<V>(cell + j, part), part);
      store(v.o * v.tanh_c, static_cast<S*>(a.h) + b * a.hidden + j, part);
      store(v.c, static_cast<S*>(a.c) + b * a.hidden + j, part);
    });
  }
}

// One vector of one row; adds to the peephole sums.
template <class V, class S, class Part>
MK_INLINE void row_backward(const LstmGatesArgs& a, int64_t b, int64_t j, const Peephole<V>& p, Peephole<V>& sum,
                            Part part) {
  const V one = V::set1(1), old = load<V>(static_cast<const S*>(a.cell) + b * a.cell_b + j, part);
  const GateValues<V> v = activate<V, S>(a, b, j, p, old, part);
  const V dh = a.dh ? load<V>(static_cast<const S*>(a.dh) + b * a.dh_b + j, part) : V::zero();
  V dc = a.dc ? load<V>(static_cast<const S*>(a.dc) + b * a.dc_b + j, part) : V::zero();
  const V dzo = dh * v.tanh_c * v.o * (one - v.o);
  dc = fma(dh * v.o, one - v.tanh_c * v.tanh_c, dc);
  if (a.peephole) dc = fma(dzo, p.o, dc);
  const V dzi = dc * v.g * v.i * (one - v.i), dzf = dc * old * v.f * (one - v.f), dzg = dc * v.i * (one - v.g * v.g);
  if (a.dgates) {
    S* out = static_cast<S*>(a.dgates) + b * 4 * a.hidden + j;
    store(dzi, out, part), store(dzf, out + a.hidden, part), store(dzg, out + 2 * a.hidden, part),
        store(dzo, out + 3 * a.hidden, part);
  }
  V dold = dc * v.f;
  if (a.peephole) dold = fma(dzi, p.i, fma(dzf, p.f, dold));
  if (a.dcell) store(dold, static_cast<S*>(a.dcell) + b * a.hidden + j, part);
  sum.i = fma(dzi, old, sum.i), sum.f = fma(dzf, old, sum.f), sum.o = fma(dzo, v.c, sum.o);
}

template <class S>
void lstm_gates_backward(const LstmGatesArgs& a, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  using V = Vec<acc_t<S>>;
  for_each_vec<V>(column_end - column, [&](int64_t i, auto part) {
    const int64_t j = column + i;
    const Peephole<V> p = load_peephole<V, S>(a, j, part);
    Peephole<V> sum{V::zero(), V::zero(), V::zero()};
    for (int64_t b = row; b < row_end; b++) row_backward<V, S>(a, b, j, p, sum, part);
    if (!a.dpeephole) return;
    S* out = static_cast<S*>(a.dpeephole) + j;
    store(sum.i, out, part), store(sum.f, out + a.hidden, part), store(sum.o, out + 2 * a.hidden, part);
  });
}

}  // namespace

const LstmGatesKernels lstm_gates = {MK_FLOAT_TYPES(lstm_gates_forward), MK_FLOAT_TYPES(lstm_gates_backward)};

}  // namespace mk::cpu::MK_LEVEL
