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

// New c and h of one vector of units, from z of its gates and the old c; the gates where training needs them.
template <class T, class Part>
MK_INLINE void cell_values(const acc_t<T>* z, Vec<acc_t<T>>& c, Vec<acc_t<T>>& h, T* gates, int64_t width, Part part) {
  using V = Vec<acc_t<T>>;
  const V i = sigmoid_for<T>(V::load(z)), forget = sigmoid_for<T>(V::load(z + V::kLanes));
  const V g = tanh_for<T>(V::load(z + 2 * V::kLanes)), o = sigmoid_for<T>(V::load(z + 3 * V::kLanes));
  c = fma(forget, c, i * g), h = o * tanh_for<T>(c);
  if (!gates) return;
  store(i, gates, part), store(forget, gates + width, part);
  store(g, gates + 2 * width, part), store(o, gates + 3 * width, part);
}

template <class T, class P, class Part>
MK_INLINE void cell_row(const LstmForward& f, const acc_t<T>* z, int64_t t, int64_t b, int64_t j, int64_t parity,
                        Part part) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const LstmRows& rows = f.rows;
  const int64_t row = t * rows.B + b, at = row * f.H + j;
  if (!rows.active(t, b)) return cell_skip<T, P>(f, row, b, j, parity, part);
  A* carry = element<A>(f.carry, b * f.ld_hidden + j);
  V c = V::load(carry), h;
  cell_values<T>(z, c, h, f.gates ? element<T>(f.gates, row * 4 * f.H + j) : nullptr, f.H, part);
  store(h, element<T>(f.output, at), part);
  if (f.cells) store(c, element<T>(f.cells, at), part);
  if (t == rows.last(b)) {
    store(h, element<T>(f.h_n, b * f.H + j), part);
    store(c, element<T>(f.c_n, b * f.H + j), part);
    return;
  }
  entering(rows, rows.next(t), b, c).store(carry);
  entering(rows, rows.next(t), b, h).store(element<P>(f.hidden[1 - parity], b * f.ld_hidden + j));
}

// Rows [begin, end) of whole panels that are all alive, keep their state and have a step to come: nothing to ask row by
// row.
template <class T, class P>
MK_INLINE void open_rows(const LstmForward& f, const acc_t<T>* z, int64_t t, Span b, int64_t j, int64_t parity) {
  using A = acc_t<T>;
  using V = Vec<A>;
  // Copies: a store through the pointers could change f for all that the compiler knows.
  const int64_t width = f.H, ld = f.ld_hidden, at = (t * f.rows.B + b.begin) * width + j;
  A* carry = element<A>(f.carry, b.begin * ld + j);
  P* hidden = element<P>(f.hidden[1 - parity], b.begin * ld + j);
  T* output = element<T>(f.output, at);
  T* cells = f.cells ? element<T>(f.cells, at) : nullptr;
  T* gates = f.gates ? element<T>(f.gates, at + 3 * (at - j)) : nullptr;
  for (int64_t r = b.begin; r < b.end; r++, z += 4 * V::kLanes, carry += ld, hidden += ld, output += width) {
    V c = V::load(carry), h;
    cell_values<T>(z, c, h, gates, width, Full{});
    c.store(carry), h.store(hidden), h.store(output);
    if (cells) c.store(cells), cells += width;
    if (gates) gates += 4 * width;
  }
}

// Rows [begin, end) of panel p; z holds them from `begin` on.
template <class T, class P>
MK_INLINE void cell_rows(const LstmForward& f, const acc_t<T>* z, int64_t t, Span b, int64_t p, int64_t parity) {
  constexpr int64_t kLanes = Vec<acc_t<T>>::kLanes;
  const int64_t j = p * kLanes, left = f.H - j;
  const bool open = !f.rows.lengths && !f.rows.reset && t != f.rows.last(0);
  if (left >= kLanes && open)
    open_rows<T, P>(f, z, t, b, j, parity);
  else if (left >= kLanes)
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

// What one row of a step back reads and writes, from its unit j on.
template <class T, class P>
struct GradientRow {
  const T *gates, *cells, *old;  // old: c that entered the step; null: zero, and nothing flows further back
  const T *doutput, *dcells;     // may be null
  acc_t<T>*carry_h, *carry_c;
  P* dz;
};

// dz of one vector of units `i` on, from dh and dc that arrive from the step after.
template <class T, class P, class Part>
MK_INLINE void gradient_values(const GradientRow<T, P>& row, int64_t i_at, int64_t width, Part part) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* gate = row.gates + i_at;
  const V i = load<V>(gate, part), forget = load<V>(gate + width, part), g = load<V>(gate + 2 * width, part);
  const V o = load<V>(gate + 3 * width, part), one = V::set1(A(1));
  const V old = row.old ? load<V>(row.old + i_at, part) : V::zero();
  V dh = V::load(row.carry_h + i_at), dc = V::load(row.carry_c + i_at);
  if (row.doutput) dh = dh + load<V>(row.doutput + i_at, part);
  if (row.dcells) dc = dc + load<V>(row.dcells + i_at, part);
  const V tanh_c = tanh_for<T>(load<V>(row.cells + i_at, part));
  dc = fma(dh * o, one - tanh_c * tanh_c, dc);
  P* dz = row.dz + i_at;
  store(dc * g * i * (one - i), dz, part);
  store(dc * old * forget * (one - forget), dz + width, part);
  store(dc * i * (one - g * g), dz + 2 * width, part);
  store(dh * tanh_c * o * (one - o), dz + 3 * width, part);
  (row.old ? dc * forget : V::zero()).store(row.carry_c + i_at);
}

template <class T, class P>
MK_INLINE GradientRow<T, P> gradient_row(const LstmBackward& f, P* dz, int64_t t, int64_t b, int64_t j) {
  using A = acc_t<T>;
  const LstmRows& rows = f.rows;
  const int64_t at = (t * rows.B + b) * f.H + j;
  const T* old = rows.resets(t, b)    ? nullptr
                 : t == rows.first(b) ? element<T>(f.c0, b * f.c0_b + j)
                                      : element<T>(f.cells, (rows.previous(t) * rows.B + b) * f.H + j);
  return {element<T>(f.gates, at + 3 * (at - j)),
          element<T>(f.cells, at),
          old,
          f.doutput ? element<T>(f.doutput, t * f.doutput_t + b * f.doutput_b + j) : nullptr,
          f.dcells ? element<T>(f.dcells, t * f.dcells_t + b * f.dcells_b + j) : nullptr,
          element<A>(f.dh, b * f.ld_hidden + j),
          element<A>(f.dc, b * f.ld_hidden + j),
          dz + b * f.ld_gates + j};
}

// dh that flows to the step before, from the product dz W_hh of one row of a panel.
template <class V>
MK_INLINE void pass_back(const LstmBackward& f, int64_t t, int64_t b, V product, typename V::T* carry) {
  if (!f.rows.active(t, b)) return;
  (f.rows.resets(t, b) ? V::zero() : product).store(carry);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
