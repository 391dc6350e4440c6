// The recurrent family backward, for levels without matrix units.
//
//   dz = gradient of the pre-activations;  dh' = dz W_hh (+ what the cell passes on);  dx = dz W_ih;
//   dW_ih = sum dz x^T;  dW_hh = sum dz h'^T;  db = sum dz
//
// Lines run backwards; a rank that takes a unit (panel of 2 vectors of units, row tile) from dz to dh' goes on to its
// dz of the line before, so a step has one barrier, between dz and dh'. After a chunk of lines the three large products
// read its dz from cache. Columns of dz that only the input or only the state has lie at its two ends. Precision: as
// forward. Sums over (t, b) are taken chunk by chunk, each from zero, so that no chain of additions is long.
#pragma once
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/recurrent_rows.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// One panel of two vectors: out[k][lane] = row(k)[first + lane], zero past `width`.
template <class T, class Row>
void pack_columns(const Row& row, int64_t count, int64_t first, int64_t width, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  for (int64_t l = 0; l < 2; l++) {
    const int64_t j = first + l * V::kLanes, left = width - j < 0 ? 0 : smaller(width - j, V::kLanes);
    for (int64_t k = 0; k < count; k++) V::load(row(k) + smaller(j, width), left).store(out + (k * 2 + l) * V::kLanes);
  }
}

template <class T>
void pack_backward(const RecurrentBackward& f, Span panels) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 2 * Vec<A>::kLanes;
  const int64_t hidden_panels = tiles_of(f.H, kPanel);
  const auto hidden = [&](int64_t k) { return element<T>(f.weight_hh, k * f.weight_hh_n); };
  const auto input = [&](int64_t k) { return element<T>(f.weight_ih, k * f.weight_ih_n); };
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const int64_t q = p - hidden_panels;
    if (q < 0)
      pack_columns<T>(hidden, f.gate_rows(), p * kPanel, f.H, element<A>(f.packed_hh, p * f.k_gates * kPanel));
    else
      pack_columns<T>(input, f.gate_rows(), q * kPanel, f.I, element<A>(f.packed_ih, q * f.k_gates * kPanel));
  }
}

// Places without units are read and written as whole vectors.
template <class T>
void start_backward(const RecurrentBackward& f, Span span) {
  using V = Vec<acc_t<T>>;
  for (int64_t r = span.begin; r < span.end; r++)
    for (int64_t j = 0; j < f.ld_hidden; j += V::kLanes) {
      V::zero().store(element<acc_t<T>>(f.dh, r * f.ld_hidden + j));
      if (f.dc) V::zero().store(element<acc_t<T>>(f.dc, r * f.ld_hidden + j));
    }
}

template <class C, class T>
void gates_backward(const RecurrentBackward& f, int64_t l, void* dz, Span units) {
  const int64_t tiles = tiles_of(f.rows.rows, tile_rows(2));
  for (int64_t u = units.begin; u < units.end; u++)
    panel_gradients<C, T>(f, l, static_cast<acc_t<T>*>(dz), tile_of(f.rows.rows, tiles, u % tiles), u / tiles);
}

template <class T>
void state_backward(const RecurrentBackward& f, int64_t l, const void* dz, Span units) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 2 * Vec<A>::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t tiles = tiles_of(f.rows.rows, tile_rows(2)), alive = f.rows.alive_at(l);
  const Sweep sweep{units, l % 2 != 0};
  for (int64_t i = 0; i < sweep.count(); i++) {
    const int64_t u = sweep[i], p = u / tiles;
    const Span rows = clip(tile_of(f.rows.rows, tiles, u % tiles), alive);
    if (rows.begin == rows.end) continue;
    gemm_tile_for<A, 2, false>(rows.end - rows.begin)(
        f.gate_rows(), element<A>(dz, rows.begin * f.ld_gates + f.hidden_column()), f.ld_gates,
        element<A>(f.packed_hh, p * f.k_gates * kPanel), nullptr, 0, product, kPanel);
    pass_back<T>(f, l, rows, p * kPanel, kPanel, product, kPanel);
  }
}

// Row r of the chunk `lines` of dx from column `first` on, from its product; a place without a step has none.
template <class T>
MK_INLINE void store_input_gradient(const RecurrentBackward& f, Span lines, int64_t r, int64_t first, int64_t width,
                                    const acc_t<T>* product) {
  using V = Vec<acc_t<T>>;
  const Slot s = f.rows.slot(lines.begin + r / f.rows.rows, r % f.rows.rows);
  if (s.b < 0) return;
  T* out = element<T>(f.dinput, f.rows.at(s) * f.I + first);
  for_each_vec<V>(smaller(width, f.I - first),
                  [&](int64_t j, auto part) { store(V::load(product + j), out + j, part); });
}

template <class T>
void input_backward(const RecurrentBackward& f, Span lines, const void* dz, Span units) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 2 * Vec<A>::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel], first[tile_rows(2) * kPanel];
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(count, tile_rows(2));
  // Rows of W_ih in their order: the columns that only the input has come last, and are the largest.
  const int64_t own = f.hidden_column(), shared = f.gate_rows() - own;
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span rows = tile_of(count, tiles, u % tiles);
    const auto tile = gemm_tile_for<A, 2, false>(rows.end - rows.begin);
    const A *a = element<A>(dz, rows.begin * f.ld_gates), *panel = element<A>(f.packed_ih, p * f.k_gates * kPanel);
    tile(shared, a + own, f.ld_gates, panel, nullptr, 0, own ? first : product, kPanel);
    if (own) tile(own, a, f.ld_gates, panel + shared * kPanel, first, kPanel, product, kPanel);
    for (int64_t r = rows.begin; r < rows.end; r++)
      store_input_gradient<T>(f, lines, r, p * kPanel, kPanel, product + (r - rows.begin) * kPanel);
  }
}

template <class T, class P>
void sum_columns(const RecurrentBackward& f, Span lines, const P* dz, Span columns) {
  using V = Vec<acc_t<T>>;
  const int64_t rows = (lines.end - lines.begin) * f.rows.rows;
  const bool first = f.first_chunk(lines);
  constexpr int64_t kBlock = 16;  // short chains of additions: plain torch sums pairwise
  for_each_vec<V>(columns.end - columns.begin, [&](int64_t i, auto part) {
    const int64_t j = columns.begin + i;
    acc_t<T>* total = element<acc_t<T>>(f.sum_bias, j);
    V sum = V::zero();
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      V block = V::zero();
      for (int64_t r = begin; r < smaller(begin + kBlock, rows); r++)
        block = block + load<V>(dz + r * f.ld_gates + j, part);
      sum = sum + block;
    }
    store(first ? sum : load<V>(total, part) + sum, total, part);
  });
}

template <class T>
void bias_backward(const RecurrentBackward& f, Span lines, const void* dz, Span columns) {
  sum_columns<T>(f, lines, static_cast<const acc_t<T>*>(dz), columns);
}

// Right operands of the weight gradients, row by row of the chunk: x, or the hidden state that enters the step; null:
// zero. Of a place without a step dz is zero.
template <class T>
void operand_rows(const RecurrentBackward& f, Span lines, const T** input, const T** hidden) {
  const RecurrentRows& rows = f.rows;
  for (int64_t l = lines.begin; l < lines.end; l++)
    for (int64_t r = 0; r < rows.rows; r++, input++, hidden++) {
      const Slot s = rows.slot(l, r);
      *input = *hidden = nullptr;
      if (s.b < 0) continue;
      *input = element<T>(f.input, s.t * f.input_t + s.b * f.input_b);
      const Entering<T> given = entering<T>(rows, f.hidden0, l, r, s);
      *hidden = given.given ? given.state : element<T>(f.output, rows.at(rows.slot(rows.previous(l), r)) * f.H);
    }
}

template <class T>
void pack_operand(const T* const* rows, int64_t count, int64_t first, int64_t width, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  const int64_t second = smaller(first + V::kLanes, width), left = smaller(width - first, V::kLanes);
  const int64_t more = smaller(width - second, V::kLanes);
  for (int64_t row = 0; row < count; row++, out += 2 * V::kLanes) {
    const T* from = rows[row];
    (from ? V::load(from + first, left) : V::zero()).store(out);
    (from ? V::load(from + second, more) : V::zero()).store(out + V::kLanes);
  }
}

// The sums in dW of column n of dz from `first` on; null: this weight has none.
template <class A>
MK_INLINE A* weight_sums(const RecurrentBackward& f, bool hidden, int64_t n, int64_t first) {
  const int64_t begin = hidden ? f.hidden_column() : 0;
  if (n < begin || n >= begin + f.gate_rows()) return nullptr;
  return hidden ? element<A>(f.sum_hh, (n - begin) * f.H + first) : element<A>(f.sum_ih, f.input_row(n) * f.I + first);
}

// A product of columns [begin, end) of dz and a panel goes to the rows of dW that belong to these columns.
template <class T>
MK_INLINE void add_weight_gradient(const RecurrentBackward& f, bool hidden, bool fresh, Span columns, int64_t first,
                                   int64_t panel, const acc_t<T>* product) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t width = hidden ? f.H : f.I;
  for (int64_t n = columns.begin; n < columns.end; n++, product += panel) {
    A* total = weight_sums<A>(f, hidden, n, first);
    if (!total) continue;
    for_each_vec<V>(smaller(panel, width - first), [&](int64_t j, auto part) {
      const V sum = V::load(product + j);
      store(fresh ? sum : load<V>(total + j, part) + sum, total + j, part);
    });
  }
}

// Units: panels of weight_ih, then of weight_hh, each with the row tiles of dW. `scratch` of this rank: rows of
// operands, then a packed panel.
template <class T>
void weight_backward(const RecurrentBackward& f, Span lines, const void* dz, void* scratch, Span units) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 2 * Vec<A>::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t tiles = tiles_of(f.gate_rows(), tile_rows(2)), input_panels = f.sum_ih ? tiles_of(f.I, kPanel) : 0;
  const int64_t count = (lines.end - lines.begin) * f.rows.rows;
  const bool fresh = f.first_chunk(lines);
  const T **input = static_cast<const T**>(scratch), **state = input + f.chunk;
  A* panel = reinterpret_cast<A*>(state + f.chunk);
  if (units.begin < units.end) operand_rows<T>(f, lines, input, state);
  int64_t packed = -1;
  for (int64_t u = units.begin; u < units.end; u++) {
    const bool hidden = u / tiles >= input_panels;
    const int64_t first = (u / tiles - (hidden ? input_panels : 0)) * kPanel, width = hidden ? f.H : f.I;
    if (packed != u / tiles) pack_operand<T>(hidden ? state : input, count, first, width, panel);
    packed = u / tiles;
    const Span rows = tile_of(f.gate_rows(), tiles, u % tiles);
    const int64_t column = rows.begin + (hidden ? f.hidden_column() : 0);
    // The sums come into cache while what is added to them is computed.
    for (int64_t n = column; n < column + rows.end - rows.begin; n++) {
      const A* sums = weight_sums<A>(f, hidden, n, first);
      __builtin_prefetch(sums), __builtin_prefetch(sums + smaller(kPanel, width - first) - 1);
    }
    gemm_tile_for<A, 2, true>(rows.end - rows.begin)(count, element<A>(dz, column), f.ld_gates, panel, nullptr, 0,
                                                     product, kPanel);
    add_weight_gradient<T>(f, hidden, fresh, {column, column + rows.end - rows.begin}, first, kPanel, product);
  }
}

template <class T>
MK_INLINE void round_to(const acc_t<T>* from, void* to, int64_t begin, int64_t count) {
  using V = Vec<acc_t<T>>;
  if (to && to != from)
    for_each_vec<V>(
        count, [&](int64_t j, auto part) { store(load<V>(from + j, part), static_cast<T*>(to) + begin + j, part); });
}

// Rounds what was summed for rows `gates` of the weights into the outputs.
template <class T>
void finish_backward(const RecurrentBackward& f, Span gates) {
  using A = acc_t<T>;
  const int64_t count = gates.end - gates.begin;
  if (f.sum_ih != f.dweight_ih)
    round_to<T>(element<A>(f.sum_ih, gates.begin * f.I), f.dweight_ih, gates.begin * f.I, count * f.I);
  if (f.sum_hh != f.dweight_hh)
    round_to<T>(element<A>(f.sum_hh, gates.begin * f.H), f.dweight_hh, gates.begin * f.H, count * f.H);
  round_to<T>(element<A>(f.sum_bias, f.hidden_column() + gates.begin), f.dbias_hh, gates.begin, count);
  for (int64_t n = gates.begin; f.dbias_ih && n < gates.end;) {
    // Column of row n of W_ih, and how many rows follow it in order.
    const int64_t turn = f.shape().rotation * f.H, column = n < turn ? n + f.gate_rows() - turn : n - turn;
    const int64_t run = smaller(gates.end, n < turn ? turn : gates.end) - n;
    round_to<T>(element<A>(f.sum_bias, column), f.dbias_ih, n, run);
    n += run;
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
