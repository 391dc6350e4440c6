// lstm with options, backward: the row phases (csrc/cpu/lstm_options.h).
//
// Saved are output, cells and gates; what else the steps need is rebuilt for a chunk of steps at once before they run
// (`recall`): the states that entered, c before zoneout, tanh's value, and the rows that layer norm had normalised.
#pragma once
#include "cpu/generic/lstm_options_rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class A>
MK_INLINE void clear_row(void* to, int64_t row, int64_t ld, int64_t width) {
  using V = Vec<A>;
  if (to) for_each_vec<V>(width, [&](int64_t j, auto part) { store(V::zero(), element<A>(to, row * ld + j), part); });
}

template <class T>
void start_options_backward(const LstmOptionsBackward& f, Span rows) {
  using A = acc_t<T>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    clear_row<A>(f.dh, b, f.ld_p, f.P), clear_row<A>(f.dc, b, f.ld_h, f.H);
    if (f.dh_n) widen<T>(element<T>(f.dh_n, b * f.dh_n_b), element<A>(f.dh, b * f.ld_p), f.P);
    if (f.dc_n) widen<T>(element<T>(f.dc_n, b * f.dc_n_b), element<A>(f.dc, b * f.ld_h), f.H);
  }
}

// Of one chunk row that is alive: c before zoneout, tanh's value, h before projection.
template <class T>
MK_INLINE void recall_cell(const LstmOptionsBackward& f, int64_t at, int64_t row) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = f.H;
  const T *gates = element<T>(f.gates, at * 4 * width), *cells = element<T>(f.cells, at * width);
  const A* old = element<A>(f.c_old, row * f.ld_h);
  A *c_new = element<A>(f.c_new, row * f.ld_h), *bounded = element<A>(f.tanh_c, row * f.ld_h);
  A *normal = element<A>(f.normal_c, row * f.ld_h), *q = element<A>(f.q, row * f.ld_h);
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    const V c = f.zoneout_c > 0 ? fma(load<V>(gates + width + j, part), load<V>(old + j, part),
                                      load<V>(gates + j, part) * load<V>(gates + 2 * width + j, part))
                                : load<V>(cells + j, part);
    store(c, c_new + j, part);
  });
  const Moments<A> m = f.gamma ? moments(c_new, width) : Moments<A>{0, 1};
  if (f.gamma) *element<A>(f.scale_c, row) = m.scale;
  const A *gamma = element<A>(f.gamma, 8 * width), *beta = element<A>(f.beta, 8 * width);
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    V y = load<V>(c_new + j, part);
    if (f.gamma) {
      const V n = (y - V::set1(m.mean)) * V::set1(m.scale);
      store(n, normal + j, part);
      y = fma(n, load<V>(gamma + j, part), load<V>(beta + j, part));
    }
    const V tanh_c = tanh_for<T>(y);
    store(tanh_c, bounded + j, part);
    if (f.q) store(load<V>(gates + 3 * width + j, part) * tanh_c, q + j, part);
  });
}

template <class T>
void recall(const LstmOptionsBackward& f, Span steps, Span rows) {
  using A = acc_t<T>;
  gather_input<T>(f, f.x, steps, rows);
  gather_hidden<T>(f, f.output, f.operand, steps, rows);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t t = steps.begin + row / f.rows.B, b = row % f.rows.B;
    clear_row<A>(f.c_old, row, f.ld_h, f.H);
    if (!f.rows.active(t, b)) {
      clear_row<A>(f.c_new, row, f.ld_h, f.H), clear_row<A>(f.tanh_c, row, f.ld_h, f.H);
      clear_row<A>(f.normal_c, row, f.ld_h, f.H), clear_row<A>(f.q, row, f.ld_h, f.H);
      continue;
    }
    const T* c = entering_row<T>(f.rows, t, b, element<T>(f.c0, b * f.c0_b), f.cells, f.H, reset_c_row<T>(f, t, b));
    if (c) widen<T>(c, element<A>(f.c_old, row * f.ld_h), f.H);
    recall_cell<T>(f, t * f.rows.B + b, row);
  }
}

template <class A>
MK_INLINE void normalise_row(A* x, A* scale, int64_t width) {
  using V = Vec<A>;
  const Moments<A> m = moments(x, width);
  *scale = m.scale;
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    store((load<V>(x + j, part) - V::set1(m.mean)) * V::set1(m.scale), x + j, part);
  });
}

template <class T>
void normalise_products(const LstmOptionsBackward& f, Span rows) {
  using A = acc_t<T>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    normalise_row(element<A>(f.normal_h, row * f.ld_z), element<A>(f.scale_h, row), 4 * f.H);
    normalise_row(element<A>(f.normal_x, row * f.ld_z), element<A>(f.scale_x, row), f.input_gates());
  }
}

// What flows back past step t, whose product with W_hh is done: to the step before, or to where it was reset from.
template <class T>
void arrive(const LstmOptionsBackward& f, int64_t t, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    const int64_t at = t * f.rows.B + b;
    const bool active = f.rows.active(t, b), resets = active && f.rows.resets(t, b);
    A *dh = element<A>(f.dh, b * f.ld_p), *dc = element<A>(f.dc, b * f.ld_h);
    if (active) {
      const A *product = element<A>(f.dproduct, b * f.ld_p), *mask = f.mask ? element<A>(f.mask, b * f.ld_p) : nullptr;
      for_each_vec<V>(f.P, [&](int64_t j, auto part) {
        const V d = load<V>(product + j, part), stay = load<V>(dh + j, part);
        store(mask ? fma(d, load<V>(mask + j, part), stay) : d + stay, dh + j, part);
      });
    }
    if (f.dreset_h && !resets) zero_row<T>(f.dreset_h, at, f.P);
    if (f.dreset_c && !resets) zero_row<T>(f.dreset_c, at, f.H);
    if (!resets) continue;
    if (f.dreset_h) round_sums<T>(dh, element<T>(f.dreset_h, at * f.P), 0, f.P);
    if (f.dreset_c) round_sums<T>(dc, element<T>(f.dreset_c, at * f.H), 0, f.H);
    clear_row<A>(dh, 0, 0, f.P), clear_row<A>(dc, 0, 0, f.H);
  }
}

// Zoneout takes the gradient of a state apart: what stays with the old value is left in `carry`.
template <class T>
MK_INLINE void part_state(const Zoneout<acc_t<T>>& zoneout, const T* upstream, acc_t<T>* carry, acc_t<T>* fresh,
                          int64_t width) {
  using V = Vec<acc_t<T>>;
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    V d = load<V>(carry + j, part), stay, rest;
    if (upstream) d = d + load<V>(upstream + j, part);
    zoneout.parted(j, d, stay, rest, part);
    store(stay, carry + j, part), store(rest, fresh + j, part);
  });
}

template <class T>
void states_backward(const LstmOptionsBackward& f, int64_t t, int64_t row, Span rows) {
  using A = acc_t<T>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (!f.rows.active(t, b)) {
      clear_row<A>(f.dz, row + b, f.ld_z, 4 * f.H), clear_row<A>(f.dz_hidden, row + b, f.ld_z, 4 * f.H);
      clear_row<A>(f.dy, row + b, f.ld_h, f.H), clear_row<A>(f.dh_new, row + b, f.ld_p, f.P);
      continue;
    }
    A* room = element<A>(f.room, b * f.ld_room);
    part_state<T>(Zoneout<A>(f, Stream::zoneout_h, f.zoneout_h, t, b, f.P, room),
                  f.doutput ? element<T>(f.doutput, t * f.doutput_t + b * f.doutput_b) : nullptr,
                  element<A>(f.dh, b * f.ld_p),
                  f.projects() ? element<A>(f.dh_new, (row + b) * f.ld_p) : element<A>(f.dq, b * f.ld_h), f.P);
    part_state<T>(Zoneout<A>(f, Stream::zoneout_c, f.zoneout_c, t, b, f.H, room),
                  f.dcells ? element<T>(f.dcells, t * f.dcells_t + b * f.dcells_b) : nullptr,
                  element<A>(f.dc, b * f.ld_h), element<A>(f.dc_new, b * f.ld_h), f.H);
  }
}

// From the gradient of o tanh(..) to those of the output gate and of the new cell, but for what comes from the gates.
template <class T>
void outputs_backward(const LstmOptionsBackward& f, int64_t t, int64_t row, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = f.H;
  const A *p = element<A>(f.peephole, 2 * width), *gamma = element<A>(f.gamma, 8 * width);
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (!f.rows.active(t, b)) continue;
    const T* gate = element<T>(f.gates, ((t * f.rows.B + b) * 4 + 3) * width);
    const A *dq = element<A>(f.dq, b * f.ld_h), *bounded = element<A>(f.tanh_c, (row + b) * f.ld_h);
    A *dz = element<A>(f.dz, (row + b) * f.ld_z + 3 * width), *dc = element<A>(f.dc_new, b * f.ld_h);
    A* dy = f.gamma ? element<A>(f.dy, (row + b) * f.ld_h) : nullptr;
    for_each_vec<V>(width, [&](int64_t j, auto part) {
      const V o = load<V>(gate + j, part), tanh_c = load<V>(bounded + j, part), one = V::set1(A(1));
      const V d = load<V>(dq + j, part) * o, du = d * tanh_c * (one - o), slope = fma(V::zero() - tanh_c, tanh_c, one);
      store(du, dz + j, part);
      V sum = load<V>(dc + j, part);
      if (f.peephole) sum = fma(du, load<V>(p + j, part), sum);
      if (dy)
        store(d * slope, dy + j, part);
      else
        sum = fma(d, slope, sum);
      store(sum, dc + j, part);
    });
    if (dy)
      norm_backward<A, true>(dy, gamma, element<A>(f.normal_c, (row + b) * f.ld_h), *element<A>(f.scale_c, row + b),
                             width, dc);
  }
}

template <class T>
void step_gates_backward(const LstmOptionsBackward& f, int64_t t, int64_t row, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = f.H;
  const A* p = element<A>(f.peephole, 0);
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (!f.rows.active(t, b)) continue;
    const T* gates = element<T>(f.gates, (t * f.rows.B + b) * 4 * width);
    const A *old = element<A>(f.c_old, (row + b) * f.ld_h), *fresh = element<A>(f.dc_new, b * f.ld_h);
    const A* more = f.cell_gate() ? element<A>(f.dc_output, b * f.ld_h) : nullptr;
    A *dz = element<A>(f.dz, (row + b) * f.ld_z), *dc = element<A>(f.dc, b * f.ld_h);
    for_each_vec<V>(width, [&](int64_t j, auto part) {
      const V i = load<V>(gates + j, part), forget = load<V>(gates + width + j, part), one = V::set1(A(1));
      const V g = load<V>(gates + 2 * width + j, part);
      V d = load<V>(fresh + j, part);
      if (more) d = d + load<V>(more + j, part);
      const V di = d * g * i * (one - i), df = d * load<V>(old + j, part) * forget * (one - forget);
      store(di, dz + j, part), store(df, dz + width + j, part),
          store(d * i * fma(V::zero() - g, g, one), dz + 2 * width + j, part);
      V back = fma(d, forget, load<V>(dc + j, part));
      if (f.peephole) back = fma(di, load<V>(p + j, part), fma(df, load<V>(p + width + j, part), back));
      store(back, dc + j, part);
    });
    if (f.gamma)
      norm_backward<A, false>(dz, element<A>(f.gamma, 4 * width), element<A>(f.normal_h, (row + b) * f.ld_z),
                              *element<A>(f.scale_h, row + b), 4 * width, element<A>(f.dz_hidden, (row + b) * f.ld_z));
  }
}

// Of the product with the input: nothing in a step waits for it.
template <class T>
void finish_input_backward(const LstmOptionsBackward& f, Span rows) {
  using A = acc_t<T>;
  for (int64_t row = rows.begin; row < rows.end; row++)
    norm_backward<A, false>(element<A>(f.dz, row * f.ld_z), element<A>(f.gamma, 0),
                            element<A>(f.normal_x, row * f.ld_z), *element<A>(f.scale_x, row), f.input_gates(),
                            element<A>(f.dz_input, row * f.ld_z));
}

template <class T>
void store_input(const LstmOptionsBackward& f, Span steps, const void* from, Span rows) {
  for (int64_t row = rows.begin; row < rows.end; row++)
    round_sums<T>(element<acc_t<T>>(from, row * f.ld_x), element<T>(f.dinput, (steps.begin * f.rows.B + row) * f.I), 0,
                  f.I);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
