// lstm, backward, for levels without matrix units.
//
//   dz = gradient of the pre-activations;  dh' = dz W_hh;  dx = dz W_ih;  dW_ih = sum dz x^T;  dW_hh = sum dz h'^T;  db
//   = sum dz
//
// Steps run backwards; a rank owns (panel of 2 vectors of units, row tile) for both halves of a step, so a step has one
// barrier, between dz and dh'. After a chunk of steps the three large products read its dz from cache. Precision: as
// forward. Sums over (t, b) are taken chunk by chunk, each from zero, so that no chain of additions is long.
#pragma once
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/lstm_cell.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// One panel of two vectors: out[k][lane] = weight[k][first + lane], zero past `width`.
template <class T>
void pack_columns(const T* weight, int64_t stride, int64_t count, int64_t first, int64_t width, acc_t<T>* out) {
  using V = Vec<acc_t<T>>;
  for (int64_t l = 0; l < 2; l++) {
    const int64_t j = first + l * V::kLanes, left = width - j < 0 ? 0 : smaller(width - j, V::kLanes);
    for (int64_t k = 0; k < count; k++)
      V::load(weight + k * stride + smaller(j, width), left).store(out + (k * 2 + l) * V::kLanes);
  }
}

template <class T>
void pack_backward(const LstmBackward& f, Span panels) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 2 * Vec<A>::kLanes;
  const int64_t hidden_panels = tiles_of(f.H, kPanel);
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const int64_t q = p - hidden_panels;
    if (q < 0)
      pack_columns<T>(element<T>(f.weight_hh, 0), f.weight_hh_n, 4 * f.H, p * kPanel, f.H,
                      element<A>(f.packed_hh, p * f.k_gates * kPanel));
    else
      pack_columns<T>(element<T>(f.weight_ih, 0), f.weight_ih_n, 4 * f.H, q * kPanel, f.I,
                      element<A>(f.packed_ih, q * f.k_gates * kPanel));
  }
}

template <class T>
void start_backward(const LstmBackward& f, Span span) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for (int64_t b = span.begin; b < span.end; b++)
    for (int64_t j = 0; j < f.ld_hidden; j += V::kLanes) {
      const int64_t left = f.H - j < 0 ? 0 : smaller(f.H - j, V::kLanes), at = smaller(j, f.H);
      (f.dh_n ? V::load(element<T>(f.dh_n, b * f.dh_n_b + at), left) : V::zero())
          .store(element<A>(f.dh, b * f.ld_hidden + j));
      (f.dc_n ? V::load(element<T>(f.dc_n, b * f.dc_n_b + at), left) : V::zero())
          .store(element<A>(f.dc, b * f.ld_hidden + j));
    }
}

// dz of step t in one panel of two vectors; P is what dz is kept in.
template <class T, class P>
void panel_gradients(const LstmBackward& f, int64_t t, P* dz, Span span, int64_t p) {
  using V = Vec<acc_t<T>>;
  const LstmRows& rows = f.rows;
  const int64_t first = p * 2 * V::kLanes, units = smaller(2 * V::kLanes, f.H - first), width = f.H;
  if (rows.lengths || rows.reset || span.begin == span.end) {
    for (int64_t b = span.begin; b < span.end; b++) {
      const auto row = gradient_row<T, P>(f, dz, t, b, first);
      const bool active = rows.active(t, b);
      for_each_vec<V>(units, [&](int64_t i, auto part) {
        if (active) return gradient_values(row, i, width, part);
        for (int g = 0; g < 4; g++) store(V::zero(), row.dz + g * width + i, part);
      });
    }
    return;
  }
  // All rows take the step: nothing to ask row by row, and pointers that no store can change for all the compiler
  // knows.
  auto row = gradient_row<T, P>(f, dz, t, span.begin, first);
  const int64_t ld = f.ld_hidden, ld_dz = f.ld_gates, old_b = t == rows.first(0) ? f.c0_b : width;
  const int64_t doutput_b = f.doutput ? f.doutput_b : 0, dcells_b = f.dcells ? f.dcells_b : 0;
  // Runs of a few lines, far apart: no hardware prefetcher finds what the next call reads.
  const bool more = t != rows.first(0);
  const int64_t after = more ? rows.previous(t) : t, back = (after - t) * rows.B * width;
  const int64_t old_back = more && after != rows.first(0) ? back : 0;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t b = span.begin; b < span.end; b++) {
    for (int64_t i = 0; more && i < units; i += kLine) {
      for (int64_t g = 0; g < 4; g++) __builtin_prefetch(row.gates + 4 * back + g * width + i);
      __builtin_prefetch(row.old + old_back + i);
    }
    for_each_vec<V>(units, [&](int64_t i, auto part) { gradient_values(row, i, width, part); });
    row.gates += 4 * width, row.cells += width, row.old += old_b, row.doutput += doutput_b, row.dcells += dcells_b;
    row.carry_h += ld, row.carry_c += ld, row.dz += ld_dz;
  }
}

template <class T>
void gates_backward(const LstmBackward& f, int64_t t, void* dz, Span units) {
  const int64_t tiles = tiles_of(f.rows.B, tile_rows(2));
  for (int64_t u = units.begin; u < units.end; u++)
    panel_gradients<T>(f, t, static_cast<acc_t<T>*>(dz), tile_of(f.rows.B, tiles, u % tiles), u / tiles);
}

template <class T>
void state_backward(const LstmBackward& f, int64_t t, const void* dz, Span units) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kPanel = 2 * V::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t tiles = tiles_of(f.rows.B, tile_rows(2));
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span rows = tile_of(f.rows.B, tiles, u % tiles);
    gemm_tile_for<A, 2, false>(rows.end - rows.begin)(4 * f.H, element<A>(dz, rows.begin * f.ld_gates), f.ld_gates,
                                                      element<A>(f.packed_hh, p * f.k_gates * kPanel), nullptr, 0,
                                                      product, kPanel);
    for (int64_t b = rows.begin; b < rows.end; b++)
      for (int64_t j = 0; j < kPanel; j += V::kLanes)
        pass_back(f, t, b, V::load(product + (b - rows.begin) * kPanel + j),
                  element<A>(f.dh, b * f.ld_hidden + p * kPanel + j));
  }
}

template <class T>
void input_backward(const LstmBackward& f, Span steps, const void* dz, Span units) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kPanel = 2 * V::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t count = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(count, tile_rows(2));
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span rows = tile_of(count, tiles, u % tiles);
    gemm_tile_for<A, 2, false>(rows.end - rows.begin)(4 * f.H, element<A>(dz, rows.begin * f.ld_gates), f.ld_gates,
                                                      element<A>(f.packed_ih, p * f.k_gates * kPanel), nullptr, 0,
                                                      product, kPanel);
    for (int64_t r = rows.begin; r < rows.end; r++) {
      T* out = element<T>(f.dinput, (steps.begin * f.rows.B + r) * f.I + p * kPanel);
      for_each_vec<V>(smaller(kPanel, f.I - p * kPanel), [&](int64_t j, auto part) {
        store(V::load(product + (r - rows.begin) * kPanel + j), out + j, part);
      });
    }
  }
}

template <class T, class P>
void sum_columns(const LstmBackward& f, Span steps, const P* dz, Span columns) {
  using V = Vec<acc_t<T>>;
  const int64_t rows = (steps.end - steps.begin) * f.rows.B;
  const bool first = f.first_chunk(steps);
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
void bias_backward(const LstmBackward& f, Span steps, const void* dz, Span columns) {
  sum_columns<T>(f, steps, static_cast<const acc_t<T>*>(dz), columns);
}

// Right operands of the weight gradients, row by row of the chunk: x, or the hidden state that enters the step; null:
// zero.
template <class T>
void operand_rows(const LstmBackward& f, Span steps, const T** input, const T** hidden) {
  const LstmRows& rows = f.rows;
  for (int64_t t = steps.begin; t < steps.end; t++)
    for (int64_t b = 0; b < rows.B; b++, input++, hidden++) {
      // Past the end of a row dz is zero, and what x holds there must not matter.
      const bool active = rows.active(t, b), started = active && !rows.resets(t, b);
      *input = active ? element<T>(f.input, t * f.input_t + b * f.input_b) : nullptr;
      *hidden = !started             ? nullptr
                : t == rows.first(b) ? element<T>(f.h0, b * f.h0_b)
                                     : element<T>(f.output, (rows.previous(t) * rows.B + b) * f.H);
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

// Units: panels of weight_ih, then of weight_hh, each with the row tiles of dW. `scratch` of this rank: rows of
// operands, then a packed panel.
template <class T>
void weight_backward(const LstmBackward& f, Span steps, const void* dz, void* scratch, Span units) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kPanel = 2 * V::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t tiles = tiles_of(4 * f.H, tile_rows(2)), input_panels = f.sum_ih ? tiles_of(f.I, kPanel) : 0;
  const int64_t count = (steps.end - steps.begin) * f.rows.B;
  const bool fresh = f.first_chunk(steps);
  const T **input = static_cast<const T**>(scratch), **state = input + f.chunk;
  A* panel = reinterpret_cast<A*>(state + f.chunk);
  if (units.begin < units.end) operand_rows<T>(f, steps, input, state);
  int64_t packed = -1;
  for (int64_t u = units.begin; u < units.end; u++) {
    const bool hidden = u / tiles >= input_panels;
    const int64_t first = (u / tiles - (hidden ? input_panels : 0)) * kPanel, width = hidden ? f.H : f.I;
    if (packed != u / tiles) pack_operand<T>(hidden ? state : input, count, first, width, panel);
    packed = u / tiles;
    const Span rows = tile_of(4 * f.H, tiles, u % tiles);
    gemm_tile_for<A, 2, true>(rows.end - rows.begin)(count, element<A>(dz, rows.begin), f.ld_gates, panel, nullptr, 0,
                                                     product, kPanel);
    for (int64_t n = rows.begin; n < rows.end; n++) {
      A* total = element<A>(hidden ? f.sum_hh : f.sum_ih, n * width + first);
      for_each_vec<V>(smaller(kPanel, width - first), [&](int64_t j, auto part) {
        const V sum = V::load(product + (n - rows.begin) * kPanel + j);
        store(fresh ? sum : load<V>(total + j, part) + sum, total + j, part);
      });
    }
  }
}

template <class T>
void round_to(const acc_t<T>* from, void* to, int64_t begin, int64_t end) {
  using V = Vec<acc_t<T>>;
  if (to && to != from)
    for_each_vec<V>(end - begin, [&](int64_t j, auto part) {
      store(load<V>(from + begin + j, part), static_cast<T*>(to) + begin + j, part);
    });
}

// Rounds what was summed into the outputs: states of rows `span`, weights and biases of `gates`.
template <class T>
void finish_backward(const LstmBackward& f, Span span, Span gates) {
  using A = acc_t<T>;
  for (int64_t b = span.begin; b < span.end; b++) {
    if (f.dh0) round_to<T>(element<A>(f.dh, b * f.ld_hidden), element<T>(f.dh0, b * f.H), 0, f.H);
    if (f.dc0) round_to<T>(element<A>(f.dc, b * f.ld_hidden), element<T>(f.dc0, b * f.H), 0, f.H);
  }
  if (f.rows.T * f.rows.B == 0) return;
  round_to<T>(element<A>(f.sum_ih, 0), f.dweight_ih, gates.begin * f.I, gates.end * f.I);
  round_to<T>(element<A>(f.sum_hh, 0), f.dweight_hh, gates.begin * f.H, gates.end * f.H);
  round_to<T>(element<A>(f.sum_bias, 0), f.dbias_ih, gates.begin, gates.end);
  round_to<T>(element<A>(f.sum_bias, 0), f.dbias_hh, gates.begin, gates.end);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
