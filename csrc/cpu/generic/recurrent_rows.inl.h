// The pointwise half of steps over a Cell, one row of one panel at a time: z and x are [rows][4 lanes] in A.
#pragma once
#include "cpu/generic/recurrent_state.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class C>
constexpr CellShape shape_of() {
  return kShapes[int(C::kCell)];
}
template <class C>
constexpr bool kCarries = shape_of<C>().cell_state || shape_of<C>().direct;

// State of one vector of units that enters line l, where it is given; `left` of the units exist.
template <class C, class T, class P>
MK_INLINE void enter(const RecurrentForward& f, int64_t l, int64_t r, int64_t j, int64_t parity, int64_t left) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const Slot s = f.rows.slot(l, r);
  if (s.b < 0) return;
  const Entering<T> hidden = entering<T>(f.rows, f.hidden0, l, r, s);
  if (!hidden.given) return;
  (hidden.state ? V::load(hidden.state + j, left) : V::zero()).store(element<P>(f.hidden[parity], r * f.ld_hidden + j));
  if constexpr (kCarries<C>) {
    const Entering<T> carry = entering<T>(f.rows, f.carry0, l, r, s);
    (carry.state ? V::load(carry.state + j, left) : V::zero()).store(element<A>(f.carry, r * f.ld_hidden + j));
  }
}

// The state that enters the first line of rows [begin, end); zeros where there are no units, which the products read.
template <class C, class T, class P>
void start_rows(const RecurrentForward& f, Span span) {
  using V = Vec<acc_t<T>>;
  for (int64_t r = span.begin; r < span.end; r++)
    for (int64_t j = 0; j < f.ld_hidden; j += V::kLanes) {
      for (void* hidden : f.hidden) V::zero().store(element<P>(hidden, r * f.ld_hidden + j));
      if (j < f.H) enter<C, T, P>(f, f.rows.first(), r, j, 0, smaller(f.H - j, V::kLanes));
    }
}

// One vector of units of one row at a line where something enters or leaves.
template <class C, class T, class P, class Part>
MK_INLINE void event_row(const RecurrentForward& f, const acc_t<T>* z, const acc_t<T>* x, int64_t l, int64_t r,
                         int64_t j, int64_t parity, Part part) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const RecurrentRows& rows = f.rows;
  const Slot s = rows.slot(l, r);
  const int64_t row = rows.at(s), at = row * f.H + j, lane = r * f.ld_hidden + j;
  V carry = kCarries<C> ? V::load(element<A>(f.carry, lane)) : V::zero(), h;
  T* gates = f.gates ? element<T>(f.gates, row * shape_of<C>().saved * f.H + j) : nullptr;
  C::template forward<T>(f, z, x, carry, h, gates, f.H, part);
  if (f.output) store(h, element<T>(f.output, at), part);
  if (f.cells) store(carry, element<T>(f.cells, at), part);
  store(h, element<P>(f.hidden[1 - parity], lane), part);  // zeros stay where there are no units: products read them
  if constexpr (kCarries<C>) carry.store(element<A>(f.carry, lane));
  if (rows.ends(l, r)) {
    if (f.h_n) store(h, element<T>(f.h_n, s.b * f.H + j), part);
    if (f.c_n) store(carry, element<T>(f.c_n, s.b * f.H + j), part);
  }
  if (l != rows.last()) enter<C, T, P>(f, rows.next(l), r, j, 1 - parity, smaller(f.H - j, V::kLanes));
}

// The rows of a whole panel that carry their state on, one after the other: nothing to ask row by row.
template <class C, class T, class P>
class OpenRows {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr CellShape kShape = shape_of<C>();

 public:
  OpenRows() = default;
  MK_INLINE OpenRows(const RecurrentForward& f, const A* z, const A* x, int64_t l, int64_t r, int64_t p, int64_t parity)
      : z_(z), x_(x), slots_(f.rows.slots ? f.rows.slots + l * f.rows.rows + r : nullptr), batch_(f.rows.B) {
    // Copies: a store through the pointers could change f for all that the compiler knows.
    const int64_t j = p * kShape.units * V::kLanes;
    width_ = f.H, ld_ = f.ld_hidden, at_ = (l * batch_ + r) * width_;
    if (kCarries<C>) carry_ = element<A>(f.carry, r * ld_ + j);
    hidden_ = element<P>(f.hidden[1 - parity], r * ld_ + j);
    if (f.output) output_ = element<T>(f.output, j);
    if (f.cells) cells_ = element<T>(f.cells, j);
    if (f.gates) gates_ = element<T>(f.gates, j);
  }
  MK_INLINE void next(const RecurrentForward& f) {
    if (slots_) at_ = (slots_->t * batch_ + slots_->b) * width_, slots_++;
#pragma GCC unroll 4
    for (int64_t j = 0; j < kShape.units * V::kLanes; j += V::kLanes) {
      V carry = kCarries<C> ? V::load(carry_ + j) : V::zero(), h;
      T* gates = gates_ ? gates_ + kShape.saved * at_ + j : nullptr;
      C::template forward<T>(f, z_ + j, x_ + j, carry, h, gates, width_, Full{});
      h.store(hidden_ + j);
      if (output_) h.store(output_ + at_ + j);
      if (cells_) carry.store(cells_ + at_ + j);
      if constexpr (kCarries<C>) carry.store(carry_ + j);
    }
    z_ += kPanelVectors * V::kLanes, x_ += kPanelVectors * V::kLanes, at_ += width_;
    hidden_ += ld_, carry_ += kCarries<C> ? ld_ : 0;
  }

 private:
  const A *z_ = nullptr, *x_ = nullptr;
  const Slot* slots_ = nullptr;
  int64_t batch_ = 0, width_ = 0, ld_ = 0, at_ = 0;
  A* carry_ = nullptr;
  P* hidden_ = nullptr;
  T *output_ = nullptr, *cells_ = nullptr, *gates_ = nullptr;
};

// A panel without places past H, at a line where no row's state enters or leaves.
template <class C, class T>
MK_INLINE bool is_open(const RecurrentForward& f, int64_t l, int64_t p) {
  return (p + 1) * shape_of<C>().units * Vec<acc_t<T>>::kLanes <= f.H && !f.rows.event(l, kLeaves) &&
         !f.rows.event(f.rows.next(l), kEnters);
}

// Rows [begin, end) of panel p, all in use; z and x hold them from `begin` on.
template <class C, class T, class P>
MK_INLINE void cell_rows(const RecurrentForward& f, const acc_t<T>* z, const acc_t<T>* x, int64_t l, Span rows,
                         int64_t p, int64_t parity) {
  constexpr int64_t kLanes = Vec<acc_t<T>>::kLanes, kPanel = kPanelVectors * kLanes, kUnits = shape_of<C>().units;
  if (is_open<C, T>(f, l, p)) {
    OpenRows<C, T, P> open(f, z, x, l, rows.begin, p, parity);
    for (int64_t r = rows.begin; r < rows.end; r++) open.next(f);
    return;
  }
  for (int64_t u = 0; u < kUnits; u++) {
    const int64_t j = (p * kUnits + u) * kLanes, left = f.H - j;
    const acc_t<T>*zu = z + u * kLanes, *xu = x + u * kLanes;
    if (left <= 0) return;
    for (int64_t r = rows.begin; r < rows.end; r++, zu += kPanel, xu += kPanel) {
      if (left >= kLanes)
        event_row<C, T, P>(f, zu, xu, l, r, j, parity, Full{});
      else
        event_row<C, T, P>(f, zu, xu, l, r, j, parity, Tail{left});
    }
  }
}

// The hidden states that enter the steps of lines whose output is known, as operands.
template <class T, class P>
void known_rows(const RecurrentForward& f, Span lines, Span span) {
  using V = Vec<acc_t<T>>;
  const RecurrentRows& rows = f.rows;
  for (int64_t row = span.begin; row < span.end; row++) {
    const int64_t l = lines.begin + row / rows.rows, r = row % rows.rows;
    const Slot s = rows.slot(l, r);
    const T* from = nullptr;
    if (s.b >= 0) {
      const Entering<T> given =
          rows.event(l, kEnters) ? entering<T>(rows, f.hidden0, l, r, s) : Entering<T>{false, nullptr};
      from = given.given ? given.state : element<T>(f.known_output, rows.at(rows.slot(rows.previous(l), r)) * f.H);
    }
    for (int64_t j = 0; j < f.ld_hidden; j += V::kLanes) {
      const int64_t left = from && j < f.H ? smaller(f.H - j, V::kLanes) : 0;
      (left ? V::load(from + j, left) : V::zero()).store(element<P>(f.known, row * f.ld_hidden + j));
    }
  }
}

// The cells of panel p over all lines, from z of their products; x as for cell_rows.
template <class C, class T, class P>
void recall_cells(const RecurrentForward& f, const void* x, Span lines, int64_t p) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = kPanelVectors * Vec<A>::kLanes;
  const int64_t count = lines.end - lines.begin;
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = f.rows.reverse ? count - 1 - i : i, row = (p * f.chunk + at * f.rows.rows) * kPanel;
    cell_rows<C, T, P>(f, element<A>(f.z, row), element<A>(x, row), lines.begin + at,
                       {0, f.rows.alive_at(lines.begin + at)}, p, 0);
  }
}

template <class T, class P>
MK_INLINE GradientRow<T, P> gradient_row(const RecurrentBackward& f, P* dz, int64_t l, int64_t r, int64_t j) {
  using A = acc_t<T>;
  const RecurrentRows& rows = f.rows;
  const Slot s = rows.slot(l, r);
  const int64_t row = rows.at(s), at = row * f.H + j;
  const bool event = rows.event(l, kEnters);
  const Entering<T> given = event ? entering<T>(rows, f.state0, l, r, s) : Entering<T>{false, nullptr};
  const T* old = !given.given ? element<T>(f.states, rows.at(rows.slot(rows.previous(l), r)) * f.H + j)
                              : (given.state ? given.state + j : nullptr);
  return {f.gates ? element<T>(f.gates, row * f.shape().saved * f.H + j) : nullptr,
          element<T>(f.states, at),
          old,
          f.doutput ? element<T>(f.doutput, s.t * f.doutput_t + s.b * f.doutput_b + j) : nullptr,
          f.dcells ? element<T>(f.dcells, s.t * f.dcells_t + s.b * f.dcells_b + j) : nullptr,
          element<A>(f.dh, r * f.ld_hidden + j),
          f.dc ? element<A>(f.dc, r * f.ld_hidden + j) : nullptr,
          dz + r * f.ld_gates + j};
}

// Gradients that arrive at the end of a sequence.
template <class T>
MK_INLINE void arrive(const void* from, int64_t stride, int64_t b, int64_t j, int64_t units, acc_t<T>* to) {
  using V = Vec<acc_t<T>>;
  for_each_vec<V>(units, [&](int64_t i, auto part) {
    (from ? load<V>(element<T>(from, b * stride + j) + i, part) : V::zero()).store(to + i);
  });
}

// What flows back out of line l of a row where its state entered from outside: to the given state, and no further.
template <class T, class Part>
MK_INLINE Vec<acc_t<T>> leave(const RecurrentBackward& f, int64_t l, int64_t r, int64_t j, Vec<acc_t<T>> flowing,
                              void* dinitial, void* dreset, Part part) {
  using V = Vec<acc_t<T>>;
  const Slot s = f.rows.slot(l, r);
  if (f.rows.resets(s)) {
    if (dreset) store(flowing, element<T>(dreset, f.rows.at(s) * f.H + j), part);
    flowing = V::zero();
  }
  if (dinitial && f.rows.starts(l, r)) store(flowing, element<T>(dinitial, s.b * f.H + j), part);
  return flowing;
}

template <class C, class T, class P>
void event_gradients(const RecurrentBackward& f, int64_t l, P* dz, int64_t r, int64_t first, int64_t units) {
  using V = Vec<acc_t<T>>;
  const auto row = gradient_row<T, P>(f, dz, l, r, first);
  if (f.rows.ends(l, r)) {
    const int64_t b = f.rows.slot(l, r).b;
    arrive<T>(f.dh_n, f.dh_n_b, b, first, units, row.dh);
    if (row.dc) arrive<T>(f.dc_n, f.dc_n_b, b, first, units, row.dc);
  }
  for_each_vec<V>(units, [&](int64_t i, auto part) {
    C::template backward<T, P>(f, row, i, f.H, part);
    if (row.dc && f.rows.event(l, kEnters))
      leave<T>(f, l, r, first + i, V::load(row.dc + i), f.dc0, f.dreset_c, part).store(row.dc + i);
  });
}

template <class T>
MK_INLINE void prefetch_gradients(const RecurrentBackward& f, int64_t l, int64_t r, int64_t j, int64_t units) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t saved = f.shape().saved, older = l == f.rows.first() ? l : f.rows.previous(l);
  const T* states = element<T>(f.states, f.rows.at(f.rows.slot(older, r)) * f.H + j);
  const T* gates = element<T>(f.gates, saved * f.rows.at(f.rows.slot(l, r)) * f.H + j);
  for (int64_t i = 0; i < units; i += kLine) {
    for (int64_t g = 0; g < saved; g++) __builtin_prefetch(gates + g * f.H + i);
    __builtin_prefetch(states + i);
  }
}

// dz of line l in one panel of two vectors; P is what dz is kept in.
template <class C, class T, class P>
void panel_gradients(const RecurrentBackward& f, int64_t l, P* dz, Span span, int64_t p) {
  using V = Vec<acc_t<T>>;
  const RecurrentRows& rows = f.rows;
  const int64_t first = p * 2 * V::kLanes, units = smaller(2 * V::kLanes, f.H - first), width = f.H;
  const Span used = clip(span, rows.alive_at(l));
  for (int64_t r = used.end; r < span.end; r++)
    for (int64_t g = 0; g < f.shape().columns; g++)
      for_each_vec<V>(
          units, [&](int64_t i, auto part) { store(V::zero(), dz + r * f.ld_gates + g * width + first + i, part); });
  if (rows.event(l, kEnters) || rows.event(l, kLeaves)) {
    for (int64_t r = used.begin; r < used.end; r++) event_gradients<C, T, P>(f, l, dz, r, first, units);
    return;
  }
  // Runs of a few lines, far apart: no hardware prefetcher finds what the next call reads.
  const int64_t before = rows.previous(l);
  for (int64_t r = used.begin; r < used.end; r++) {
    const auto row = gradient_row<T, P>(f, dz, l, r, first);
    prefetch_gradients<T>(f, before, r, first, units);
    for_each_vec<V>(units, [&](int64_t i, auto part) { C::template backward<T, P>(f, row, i, width, part); });
  }
}

// dh that flows to the line before, from the product dz W_hh of rows [begin, end): `width` columns from unit j on.
template <class T>
MK_INLINE void pass_back(const RecurrentBackward& f, int64_t l, Span span, int64_t j, int64_t width,
                         const acc_t<T>* product, int64_t ld) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const bool direct = f.shape().direct, event = f.rows.event(l, kEnters);
  for (int64_t r = span.begin; r < span.end; r++, product += ld)
    for (int64_t i = 0; i < width; i += V::kLanes) {
      A* dh = element<A>(f.dh, r * f.ld_hidden + j + i);
      V flowing = V::load(product + i);
      if (direct) flowing = flowing + V::load(dh);
      const int64_t left = f.H - j - i;
      if (event && left >= V::kLanes)
        flowing = leave<T>(f, l, r, j + i, flowing, f.dh0, f.dreset_h, Full{});
      else if (event && left > 0)
        flowing = leave<T>(f, l, r, j + i, flowing, f.dh0, f.dreset_h, Tail{left});
      flowing.store(dh);
    }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
