// lstm with options, forward: the row phases of a step (csrc/cpu/lstm_options.h). Products are summed and everything
// between input and output is computed in A; statistics of layer norm in two passes.
#pragma once
#include "cpu/generic/layer_norm.inl.h"
#include "cpu/generic/gates.inl.h"
#include "cpu/generic/recurrent_state.inl.h"
#include "cpu/generic/random.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

MK_INLINE uint32_t threshold_of(double probability) { return uint32_t(__builtin_rint(probability * 16777216.0)); }

// Weights of a row's old values under zoneout, one of three: none, the same for all units, 1 and 0 by lot.
template <class A>
class Zoneout {
 public:
  // `room`: n numbers, rounded up to whole vectors of floats.
  Zoneout(const LstmOptions& f, Stream stream, double probability, int64_t t, int64_t b, int64_t n, A* room)
      : on_(probability > 0), all_(A(probability)) {
    if (!on_ || f.expected) return;
    random_events<A>(random_row(f.seed, stream, t, b), threshold_of(probability), n, A(1), A(0), room);
    each_ = room;
  }
  template <class Part>
  MK_INLINE Vec<A> share(int64_t j, Part part) const {
    return each_ ? load<Vec<A>>(each_ + j, part) : Vec<A>::set1(all_);
  }
  // A select, so that the value not taken may be anything.
  template <class Part>
  MK_INLINE Vec<A> mixed(int64_t j, Vec<A> old, Vec<A> fresh, Part part) const {
    if (!on_) return fresh;
    const Vec<A> w = share(j, part), one = Vec<A>::set1(A(1));
    if (each_) return Vec<A>(select(w == one, old, fresh));
    return fma(w, old, (one - w) * fresh);
  }
  // Gradients of the old and of the new value.
  template <class Part>
  MK_INLINE void parted(int64_t j, Vec<A> d, Vec<A>& old, Vec<A>& fresh, Part part) const {
    old = Vec<A>::zero(), fresh = d;
    if (!on_) return;
    const Vec<A> w = share(j, part), one = Vec<A>::set1(A(1)), zero = Vec<A>::zero();
    if (each_)
      old = select(w == one, d, zero), fresh = select(w == one, zero, d);
    else
      old = w * d, fresh = (one - w) * d;
  }

 private:
  bool on_;
  A all_;
  const A* each_ = nullptr;
};

template <class T>
void widen(const void* from, void* to, int64_t n) {
  using V = Vec<acc_t<T>>;
  for_each_vec<V>(
      n, [&](int64_t j, auto part) { store(load<V>(element<T>(from, j), part), element<acc_t<T>>(to, j), part); });
}

template <class T>
void prepare_options(const LstmOptions& f) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for_each_vec<V>(4 * f.H, [&](int64_t j, auto part) {
    V sum = f.bias_ih ? load<V>(element<T>(f.bias_ih, j), part) : V::zero();
    if (f.bias_hh) sum = sum + load<V>(element<T>(f.bias_hh, j), part);
    store(sum, element<A>(f.bias, j), part);
  });
  for (int64_t p = 0; f.peephole && p < 3; p++)
    widen<T>(element<T>(f.raw_peephole, p * f.raw_peephole_p), element<A>(f.peephole, p * f.H), f.H);
  if (f.gamma) widen<T>(f.raw_gamma, f.gamma, 9 * f.H), widen<T>(f.raw_beta, f.beta, 9 * f.H);
}

template <class T>
void draw_mask(const LstmOptions& f, Span rows) {
  using A = acc_t<T>;
  for (int64_t b = rows.begin; b < rows.end; b++)
    random_events<A>(random_row(f.seed, Stream::recurrent_dropout, 0, b), threshold_of(f.dropout), f.P, A(0),
                     A(1) / A(1 - f.dropout), element<A>(f.mask, b * f.ld_p));
}

// A state that enters a step, of the rows that are alive there; null: zero.
template <class T>
MK_INLINE const T* entering_row(const SteppedRows& rows, int64_t t, int64_t b, const T* first, const void* states,
                                int64_t width, const T* reset) {
  if (rows.resets(t, b)) return reset;
  return t == rows.first(b) ? first : element<T>(states, (rows.previous(t) * rows.B + b) * width);
}
template <class T>
MK_INLINE const T* reset_h_row(const LstmOptions& f, int64_t t, int64_t b) {
  return f.reset_h ? element<T>(f.reset_h, t * f.reset_h_t + b * f.reset_h_b) : nullptr;
}
template <class T>
MK_INLINE const T* reset_c_row(const LstmOptions& f, int64_t t, int64_t b) {
  return f.reset_c ? element<T>(f.reset_c, t * f.reset_c_t + b * f.reset_c_b) : nullptr;
}

// to = from under the mask of recurrent dropout; from null: zero.
template <class T, class S>
MK_INLINE void masked_row(const LstmOptions& f, int64_t b, const S* from, acc_t<T>* to) {
  using V = Vec<acc_t<T>>;
  const acc_t<T>* mask = f.mask ? element<acc_t<T>>(f.mask, b * f.ld_p) : nullptr;
  for_each_vec<V>(f.P, [&](int64_t j, auto part) {
    const V h = from ? load<V>(from + j, part) : V::zero();
    store(mask ? h * load<V>(mask + j, part) : h, to + j, part);
  });
}

// Past the end of a row the input may be anything: zero is read instead.
template <class T>
void gather_input(const LstmOptions& f, void* x, Span steps, Span rows) {
  using V = Vec<acc_t<T>>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t t = steps.begin + row / f.rows.B, b = row % f.rows.B;
    const T* from = f.rows.active(t, b) ? element<T>(f.input, t * f.input_t + b * f.input_b) : nullptr;
    acc_t<T>* to = element<acc_t<T>>(x, row * f.ld_x);
    for_each_vec<V>(f.I,
                    [&](int64_t j, auto part) { store(from ? load<V>(from + j, part) : V::zero(), to + j, part); });
  }
}

// What the hidden states that enter the steps multiply W_hh as.
template <class T>
void gather_hidden(const LstmOptions& f, const void* output, void* operand, Span steps, Span rows) {
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t t = steps.begin + row / f.rows.B, b = row % f.rows.B;
    const T* from = f.rows.active(t, b) ? entering_row<T>(f.rows, t, b, element<T>(f.h0, b * f.h0_b), output, f.P,
                                                          reset_h_row<T>(f, t, b))
                                        : nullptr;
    masked_row<T>(f, b, from, element<acc_t<T>>(operand, row * f.ld_p));
  }
}

template <class T>
void start_options(const LstmOptionsForward& f, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    const T *h = element<T>(f.h0, b * f.h0_b), *c = element<T>(f.c0, b * f.c0_b);
    if (f.rows.length(b) == 0 && !f.known_output) {
      for_each_vec<V>(f.P,
                      [&](int64_t j, auto part) { store(load<V>(h + j, part), element<T>(f.h_n, b * f.P + j), part); });
      for_each_vec<V>(f.H,
                      [&](int64_t j, auto part) { store(load<V>(c + j, part), element<T>(f.c_n, b * f.H + j), part); });
    }
    if (f.rows.length(b) > 0 && f.rows.resets(f.rows.first(b), b))
      h = reset_h_row<T>(f, f.rows.first(b), b), c = reset_c_row<T>(f, f.rows.first(b), b);
    A *hidden = element<A>(f.hidden, b * f.ld_p), *carry = element<A>(f.carry, b * f.ld_h);
    for_each_vec<V>(f.H, [&](int64_t j, auto part) { store(c ? load<V>(c + j, part) : V::zero(), carry + j, part); });
    if (f.known_output) continue;
    for_each_vec<V>(f.P, [&](int64_t j, auto part) { store(h ? load<V>(h + j, part) : V::zero(), hidden + j, part); });
    if (f.operand != f.hidden) masked_row<T>(f, b, hidden, element<A>(f.operand, b * f.ld_p));
  }
}

// From the product with the input to all that does not depend on the state.
template <class T>
void finish_input(const LstmOptions& f, void* projected, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t seen = f.input_gates();
  const A *bias = element<A>(f.bias, 0), *gamma = element<A>(f.gamma, 0), *beta = element<A>(f.beta, 0);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    A* z = element<A>(projected, row * f.ld_z);
    const Moments<A> m = f.gamma ? moments(z, seen) : Moments<A>{0, 1};
    for_each_vec<V>(seen, [&](int64_t j, auto part) {
      V x = load<V>(z + j, part);
      if (f.gamma) x = fma((x - V::set1(m.mean)) * V::set1(m.scale), load<V>(gamma + j, part), load<V>(beta + j, part));
      store(x + load<V>(bias + j, part), z + j, part);
    });
    if (seen < 4 * f.H)
      for_each_vec<V>(f.H, [&](int64_t j, auto part) { store(load<V>(bias + seen + j, part), z + seen + j, part); });
  }
}

// Accurate in any T where there is a norm: c and h are not rounded on their way into it, and it takes the mean out and
// multiplies what is left.
template <class T, class A>
MK_INLINE Vec<A> sigmoid_with(bool norm, Vec<A> x) {
  return norm ? gate_sigmoid(x) : sigmoid_for<T>(x);
}
template <class T, class A>
MK_INLINE Vec<A> tanh_with(bool norm, Vec<A> x) {
  return norm ? gate_tanh<(sizeof(T) > 2)>(x) : tanh_for<T>(x);
}

// i, f, g and the new cell of one row; the argument of the output gate stays in z, as far as it is known.
template <class T>
MK_INLINE void gates_of_row(const LstmOptionsForward& f, const acc_t<T>* x, acc_t<T>* z, const acc_t<T>* c,
                            acc_t<T>* c_new, T* gates) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = f.H;
  const A *gamma = element<A>(f.gamma, 4 * width), *beta = element<A>(f.beta, 4 * width),
          *p = element<A>(f.peephole, 0);
  const bool norm = f.gamma, peephole = f.peephole;
  const Moments<A> m = norm ? moments(z, 4 * width) : Moments<A>{0, 1};
  const V mean = V::set1(m.mean), scale = V::set1(m.scale);
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    V u[4];
    for (int64_t g = 0; g < 4; g++) {
      const int64_t at = g * width + j;
      V h = load<V>(z + at, part);
      if (norm) h = fma((h - mean) * scale, load<V>(gamma + at, part), load<V>(beta + at, part));
      u[g] = load<V>(x + at, part) + h;
    }
    const V old = load<V>(c + j, part);
    if (peephole) u[0] = fma(load<V>(p + j, part), old, u[0]), u[1] = fma(load<V>(p + width + j, part), old, u[1]);
    const V i = sigmoid_with<T>(norm, u[0]), forget = sigmoid_with<T>(norm, u[1]), g = tanh_with<T>(norm, u[2]);
    const V fresh = fma(forget, old, i * g);
    store(fresh, c_new + j, part);
    store(peephole ? fma(load<V>(p + 2 * width + j, part), fresh, u[3]) : u[3], z + 3 * width + j, part);
    if (!gates) return;
    store(i, gates + j, part), store(forget, gates + width + j, part), store(g, gates + 2 * width + j, part);
  });
}

template <class T>
void step_gates(const LstmOptionsForward& f, int64_t t, int64_t row, Span rows) {
  using A = acc_t<T>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (!f.rows.active(t, b)) continue;
    gates_of_row<T>(f, element<A>(f.projected, (row + b) * f.ld_z),
                    element<A>(f.z, ((f.known_output ? row : 0) + b) * f.ld_z), element<A>(f.carry, b * f.ld_h),
                    element<A>(f.c_new, b * f.ld_h),
                    f.gates ? element<T>(f.gates, (t * f.rows.B + b) * 4 * f.H) : nullptr);
  }
}

// The output gate and h before projection and zoneout.
template <class T>
void step_outputs(const LstmOptionsForward& f, int64_t t, int64_t row, Span rows) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = f.H;
  const A *gamma = element<A>(f.gamma, 8 * width), *beta = element<A>(f.beta, 8 * width);
  const bool norm = f.gamma && f.q;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    if (!f.rows.active(t, b)) continue;
    const A* z = element<A>(f.z, ((f.known_output ? row : 0) + b) * f.ld_z + 3 * width);
    const A *c_new = element<A>(f.c_new, b * f.ld_h),
            *more = f.cell_gate() ? element<A>(f.from_cell, b * f.ld_h) : nullptr;
    A* q = f.q ? element<A>(f.q, b * f.ld_h) : nullptr;
    T* gates = f.gates ? element<T>(f.gates, ((t * f.rows.B + b) * 4 + 3) * width) : nullptr;
    const Moments<A> m = norm ? moments(c_new, width) : Moments<A>{0, 1};
    for_each_vec<V>(width, [&](int64_t j, auto part) {
      V u = load<V>(z + j, part);
      if (more) u = u + load<V>(more + j, part);
      const V o = sigmoid_with<T>(f.gamma, u);
      if (gates) store(o, gates + j, part);
      if (!q) return;
      V y = load<V>(c_new + j, part);
      if (norm) y = fma((y - V::set1(m.mean)) * V::set1(m.scale), load<V>(gamma + j, part), load<V>(beta + j, part));
      store(o * tanh_with<T>(norm, y), q + j, part);
    });
  }
}

// The new value of one state, mixed with the old one, into outputs and into what enters the next step.
template <class T>
struct StateRow {
  acc_t<T>* state;  // old, then what enters the next step
  const acc_t<T>* fresh;
  T *out, *last;   // may be null; last: where the state at the end of the row goes
  bool resets;     // before the next step
  const T* reset;  // null: to zero
};

template <class T>
MK_INLINE void advance_state(const StateRow<T>& s, const Zoneout<acc_t<T>>& zoneout, int64_t width) {
  using V = Vec<acc_t<T>>;
  for_each_vec<V>(width, [&](int64_t j, auto part) {
    V v = zoneout.mixed(j, load<V>(s.state + j, part), load<V>(s.fresh + j, part), part);
    if (s.out) store(v, s.out + j, part);
    if (s.last) store(v, s.last + j, part);
    if (s.resets) v = s.reset ? load<V>(s.reset + j, part) : V::zero();
    store(v, s.state + j, part);
  });
}

template <class T>
MK_INLINE void zero_row(void* to, int64_t row, int64_t width) {
  using V = Vec<acc_t<T>>;
  if (to)
    for_each_vec<V>(width, [&](int64_t j, auto part) { store(V::zero(), element<T>(to, row * width + j), part); });
}

template <class T>
void step_states(const LstmOptionsForward& f, int64_t t, Span rows) {
  using A = acc_t<T>;
  for (int64_t b = rows.begin; b < rows.end; b++) {
    const int64_t at = t * f.rows.B + b;
    if (!f.rows.active(t, b)) {
      zero_row<T>(f.output, at, f.P), zero_row<T>(f.cells, at, f.H), zero_row<T>(f.gates, at, 4 * f.H);
      continue;
    }
    const bool last = t == f.rows.last(b);
    const int64_t next = last ? t : f.rows.next(t);
    const bool resets = !last && f.rows.resets(next, b);
    A* room = element<A>(f.room, b * f.ld_room);
    const StateRow<T> c{element<A>(f.carry, b * f.ld_h),
                        element<A>(f.c_new, b * f.ld_h),
                        f.cells ? element<T>(f.cells, at * f.H) : nullptr,
                        last && f.c_n ? element<T>(f.c_n, b * f.H) : nullptr,
                        resets,
                        reset_c_row<T>(f, next, b)};
    advance_state<T>(c, Zoneout<A>(f, Stream::zoneout_c, f.zoneout_c, t, b, f.H, room), f.H);
    if (!f.output) continue;
    A* hidden = element<A>(f.hidden, b * f.ld_p);
    const StateRow<T> h{hidden,
                        f.projects() ? element<A>(f.h_new, b * f.ld_p) : element<A>(f.q, b * f.ld_h),
                        element<T>(f.output, at * f.P),
                        last ? element<T>(f.h_n, b * f.P) : nullptr,
                        resets,
                        reset_h_row<T>(f, next, b)};
    advance_state<T>(h, Zoneout<A>(f, Stream::zoneout_h, f.zoneout_h, t, b, f.P, room), f.P);
    if (f.operand != f.hidden) masked_row<T>(f, b, hidden, element<A>(f.operand, b * f.ld_p));
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
