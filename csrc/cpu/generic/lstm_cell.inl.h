// The pointwise half of lstm steps, one row of one panel at a time: z is [rows][4 lanes] in A, a state is what enters a
// step.
#pragma once
#include "cpu/generic/gates.inl.h"
#include "cpu/lstm.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// State of row b that enters its next step t: zero where an episode starts.
template <class V>
MK_INLINE V entering(const LstmRows& rows, int64_t t, int64_t b, V state) {
  return rows.resets(t, b) ? V::zero() : state;
}

template <class T>
MK_INLINE T* element(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}
template <class T>
MK_INLINE const T* element(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

// A row that is not alive at t: outputs are zero and the state stays as it is.
template <class T, class P, class Part>
MK_INLINE void cell_skip(const LstmForward& f, int64_t row, int64_t b, int64_t j, int64_t parity, Part part) {
  using V = Vec<acc_t<T>>;
  const int64_t at = row * f.H + j;
  store(V::zero(), element<T>(f.output, at), part);
  if (f.cells) store(V::zero(), element<T>(f.cells, at), part);
  if (f.gates)
    for (int g = 0; g < 4; g++) store(V::zero(), element<T>(f.gates, (row * 4 + g) * f.H + j), part);
  V::load(element<P>(f.hidden[parity], b * f.ld_hidden + j))
      .store(element<P>(f.hidden[1 - parity], b * f.ld_hidden + j));
}

template <class T, class P, class Part>
MK_INLINE void cell_row(const LstmForward& f, const acc_t<T>* z, int64_t t, int64_t b, int64_t j, int64_t parity,
                        Part part) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const LstmRows& rows = f.rows;
  const int64_t row = t * rows.B + b, at = row * f.H + j;
  if (!rows.active(t, b)) return cell_skip<T, P>(f, row, b, j, parity, part);
  constexpr bool kExact = sizeof(T) > 2;
  A* carry = element<A>(f.carry, b * f.ld_hidden + j);
  const V i = gate_sigmoid(V::load(z)), forget = gate_sigmoid(V::load(z + V::kLanes));
  const V g = gate_tanh<kExact>(V::load(z + 2 * V::kLanes)), o = gate_sigmoid(V::load(z + 3 * V::kLanes));
  const V c = fma(forget, V::load(carry), i * g), h = o * gate_tanh<kExact>(c);
  store(h, element<T>(f.output, at), part);
  if (f.cells) store(c, element<T>(f.cells, at), part);
  if (f.gates) {
    T* out = element<T>(f.gates, row * 4 * f.H + j);
    store(i, out, part), store(forget, out + f.H, part), store(g, out + 2 * f.H, part), store(o, out + 3 * f.H, part);
  }
  if (t == rows.last(b)) {
    store(h, element<T>(f.h_n, b * f.H + j), part);
    store(c, element<T>(f.c_n, b * f.H + j), part);
    return;
  }
  entering(rows, rows.next(t), b, c).store(carry);
  entering(rows, rows.next(t), b, h).store(element<P>(f.hidden[1 - parity], b * f.ld_hidden + j));
}

// Rows [begin, end) of panel p; z holds them from `begin` on.
template <class T, class P>
MK_INLINE void cell_rows(const LstmForward& f, const acc_t<T>* z, int64_t t, Span b, int64_t p, int64_t parity) {
  constexpr int64_t kLanes = Vec<acc_t<T>>::kLanes;
  const int64_t j = p * kLanes, left = f.H - j;
  if (left >= kLanes)
    for (int64_t r = b.begin; r < b.end; r++, z += 4 * kLanes) cell_row<T, P>(f, z, t, r, j, parity, Full{});
  else
    for (int64_t r = b.begin; r < b.end; r++, z += 4 * kLanes) cell_row<T, P>(f, z, t, r, j, parity, Tail{left});
}

// The state that enters the first step of rows [begin, end); rows without steps hand it through.
template <class T, class P>
void lstm_start(const LstmForward& f, Span span) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for (int64_t b = span.begin; b < span.end; b++) {
    const T *h0 = element<T>(f.h0, b * f.h0_b), *c0 = element<T>(f.c0, b * f.c0_b);
    P* hidden = element<P>(f.hidden[0], b * f.ld_hidden);
    A* carry = element<A>(f.carry, b * f.ld_hidden);
    const bool empty = f.rows.length(b) == 0, clear = !empty && f.rows.resets(f.rows.first(b), b);
    for (int64_t j = 0; j < f.ld_hidden; j += V::kLanes) {
      const int64_t left = f.H - j < 0 ? 0 : smaller(f.H - j, V::kLanes);
      const V h = clear ? V::zero() : V::load(h0 + smaller(j, f.H), left);
      h.store(hidden + j);
      V::zero().store(element<P>(f.hidden[1], b * f.ld_hidden + j));
      (clear ? V::zero() : V::load(c0 + smaller(j, f.H), left)).store(carry + j);
    }
    if (!empty) continue;
    for_each_vec<V>(f.H, [&](int64_t j, auto part) {
      store(load<V>(h0 + j, part), element<T>(f.h_n, b * f.H + j), part);
      store(load<V>(c0 + j, part), element<T>(f.c_n, b * f.H + j), part);
    });
  }
}

// z -> gradients of one row of `lanes` units at step t, from dh and dc that arrive from the step after.
template <class T, class P, class Part>
MK_INLINE void gradient_row(const LstmBackward& f, P* dz, int64_t t, int64_t b, int64_t j, Part part) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr bool kExact = sizeof(T) > 2;
  const LstmRows& rows = f.rows;
  if (!rows.active(t, b)) {
    for (int g = 0; g < 4; g++) store(V::zero(), dz + g * f.H, part);
    return;
  }
  const int64_t row = t * rows.B + b;
  const T* gate = element<T>(f.gates, row * 4 * f.H + j);
  const V i = load<V>(gate, part), forget = load<V>(gate + f.H, part), g = load<V>(gate + 2 * f.H, part);
  const V o = load<V>(gate + 3 * f.H, part), one = V::set1(A(1));
  V old = V::zero();
  if (!rows.resets(t, b))
    old = t == rows.first(b) ? load<V>(element<T>(f.c0, b * f.c0_b + j), part)
                             : load<V>(element<T>(f.cells, (rows.previous(t) * rows.B + b) * f.H + j), part);
  A *carry_h = element<A>(f.dh, b * f.ld_hidden + j), *carry_c = element<A>(f.dc, b * f.ld_hidden + j);
  V dh = V::load(carry_h), dc = V::load(carry_c);
  if (f.doutput) dh = dh + load<V>(element<T>(f.doutput, t * f.doutput_t + b * f.doutput_b + j), part);
  if (f.dcells) dc = dc + load<V>(element<T>(f.dcells, t * f.dcells_t + b * f.dcells_b + j), part);
  const V tanh_c = gate_tanh<kExact>(load<V>(element<T>(f.cells, row * f.H + j), part));
  dc = fma(dh * o, one - tanh_c * tanh_c, dc);
  store(dc * g * i * (one - i), dz, part);
  store(dc * old * forget * (one - forget), dz + f.H, part);
  store(dc * i * (one - g * g), dz + 2 * f.H, part);
  store(dh * tanh_c * o * (one - o), dz + 3 * f.H, part);
  (rows.resets(t, b) ? V::zero() : dc * forget).store(carry_c);
}

// dh that flows to the step before, from the product dz W_hh of one row of a panel.
template <class V>
MK_INLINE void pass_back(const LstmBackward& f, int64_t t, int64_t b, V product, typename V::T* carry) {
  if (!f.rows.active(t, b)) return;
  (f.rows.resets(t, b) ? V::zero() : product).store(carry);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
