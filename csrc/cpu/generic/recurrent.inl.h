// The recurrent family forward, for levels without matrix units; csrc/cpu/recurrent.h says how the work is cut.
//
// A rank owns (panel, row tile) units: the register tile holds all gates of its units, so a cell is finished where its
// sums are. Bytes: weights are read from cache each step, the input once a chunk; outputs are written once. Precision:
// products and sums in A, activations in A, what a cell carries in A, h exchanged in P.
#if defined(__AVX512F__)
#include "cpu/avx512/transpose.h"
#endif
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/gru_cell.inl.h"
#include "cpu/generic/lstm_cell.inl.h"
#include "cpu/generic/recurrent_backward.inl.h"
#include "cpu/generic/recurrent_rows.inl.h"
#include "cpu/generic/rnn_cell.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The block [16 units][count] of one gate by transposition in registers, where the level can; false: not done.
template <int64_t kVectors, class T>
MK_INLINE bool pack_gate_blocks(const T*, int64_t, int64_t, int64_t, acc_t<T>*) {
  return false;
}
#if defined(__AVX512F__)
template <int64_t kVectors>
MK_INLINE bool pack_gate_blocks(const float* from, int64_t stride, int64_t units, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += 16) {
    const int64_t left = smaller(16, count - k);
    __m512i words[16];
    for (int64_t l = 0; l < 16; l++)
      words[l] =
          l < units ? _mm512_castps_si512(Vec<float>::load(from + l * stride + k, left).v) : _mm512_setzero_si512();
    transpose_words(words);
    for (int64_t j = 0; j < left; j++) _mm512_storeu_si512(out + (k + j) * kVectors * 16, words[j]);
  }
  return true;
}
#endif

// Where vector v of panel p lies in a weight matrix with H rows a gate: its first row, and how many units exist.
struct GateVector {
  int64_t row, units;
};
template <class C>
MK_INLINE GateVector gate_vector(int64_t hidden, int64_t lanes, int64_t p, int64_t v, int64_t rotation) {
  constexpr CellShape kShape = shape_of<C>();
  const int64_t first = smaller((p * kShape.units + v % kShape.units) * lanes, hidden);
  const int64_t gate = (v / kShape.units + rotation) % kShape.gates;
  return {gate * hidden + first, smaller(lanes, hidden - first)};
}

// One panel of a weight matrix: out[k][vector][lane] = weight[row of vector + lane][k], zero for units past H.
template <class C, class T>
void pack_gates(const T* weight, int64_t stride, int64_t hidden, int64_t p, int64_t rotation, int64_t count,
                acc_t<T>* out) {
  constexpr int64_t kLanes = Vec<acc_t<T>>::kLanes, kVectors = shape_of<C>().vectors();
  for (int64_t v = 0; v < kVectors; v++) {
    const auto [row, units] = gate_vector<C>(hidden, kLanes, p, v, rotation);
    const T* from = weight + row * stride;
    if (pack_gate_blocks<kVectors>(from, stride, units, count, out + v * kLanes)) continue;
    for (int64_t k = 0; k < count; k++) {
      acc_t<T>* to = out + (k * kVectors + v) * kLanes;
      for (int64_t l = 0; l < units; l++) to[l] = acc_t<T>(to_float(from[l * stride + k]));
      for (int64_t l = units; l < kLanes; l++) to[l] = 0;
    }
  }
}

// Biases of a panel, vector by vector as in its z.
template <class C, class T>
void pack_bias(const RecurrentForward& f, int64_t p) {
  using V = Vec<acc_t<T>>;
  constexpr CellShape kShape = shape_of<C>();
  acc_t<T>* bias = element<acc_t<T>>(f.bias, p * kPanelVectors * V::kLanes);
  const auto part = [&](const void* from, int64_t v, int64_t rotation) {
    const auto [row, units] = gate_vector<C>(f.H, V::kLanes, p, v, rotation);
    return from ? V::load(element<T>(from, row), units) : V::zero();
  };
  for (int64_t v = 0; v < kPanelVectors; v++) {
    V sum = v < kShape.vectors() ? part(f.bias_ih, v, kShape.rotation) : V::zero();
    if (v >= kShape.hidden) sum = sum + part(f.bias_hh, v - kShape.hidden, 0);
    sum.store(bias + v * V::kLanes);
  }
}

// What only the product of the state has starts from the bias; kept with what the input gives, row by row.
template <class C, class A>
void fill_hidden_bias(const RecurrentForward& f, int64_t p) {
  using V = Vec<A>;
  constexpr int64_t kPanel = kPanelVectors * V::kLanes;
  for (int64_t v = shape_of<C>().vectors(); f.projected && v < kPanelVectors; v++) {
    const V bias = V::load(element<A>(f.bias, p * kPanel + v * V::kLanes));
    A* out = element<A>(f.projected, p * f.chunk * kPanel + v * V::kLanes);
    for (int64_t row = 0; row < f.chunk; row++) bias.store(out + row * kPanel);
  }
}

template <class C, class T>
void pack(const RecurrentForward& f, Span panels) {
  using A = acc_t<T>;
  constexpr int64_t kWidth = shape_of<C>().vectors() * Vec<A>::kLanes;
  for (int64_t p = panels.begin; p < panels.end; p++) {
    pack_gates<C, T>(element<T>(f.weight_ih, 0), f.weight_ih_n, f.H, p, shape_of<C>().rotation, f.I,
                     element<A>(f.packed_ih, p * f.k_input * kWidth));
    pack_gates<C, T>(element<T>(f.weight_hh, 0), f.weight_hh_n, f.H, p, 0, f.H,
                     element<A>(f.packed_hh, p * f.k_hidden * kWidth));
    pack_bias<C, T>(f, p);
    fill_hidden_bias<C, A>(f, p);
  }
}

// Rows of the chunk `lines` in the element type of the operands; a place without a step gets zeros.
template <class T>
void gather(const RecurrentForward& f, Span lines, Span rows) {
  using V = Vec<acc_t<T>>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const Slot s = f.rows.slot(lines.begin + row / f.rows.rows, row % f.rows.rows);
    const T* from = s.b < 0 ? nullptr : element<T>(f.input, s.t * f.input_t + s.b * f.input_b);
    acc_t<T>* to = element<acc_t<T>>(f.x, row * f.ld_x);
    for_each_vec<V>(f.I,
                    [&](int64_t j, auto part) { store(from ? load<V>(from + j, part) : V::zero(), to + j, part); });
  }
}

template <class C, class T>
void project(const RecurrentForward& f, Span lines, Span units) {
  using A = acc_t<T>;
  constexpr int kVectors = shape_of<C>().vectors();
  constexpr int64_t kLanes = Vec<A>::kLanes, kPanel = kPanelVectors * kLanes;
  const int64_t rows = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(rows, tile_rows(kVectors));
  // Without a gathered copy (float, double) the operand is the input, whose rows then have one stride.
  const A* x = f.x ? element<A>(f.x, 0) : element<A>(f.input, lines.begin * f.input_t);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span r = tile_of(rows, tiles, u % tiles);
    gemm_tile_for<A, kVectors, false>(r.end - r.begin)(
        f.I, x + r.begin * f.ld_x, f.ld_x, element<A>(f.packed_ih, p * f.k_input * kVectors * kLanes),
        element<A>(f.bias, p * kPanel), 0, element<A>(f.projected, (p * f.chunk + r.begin) * kPanel), kPanel);
  }
}

// `row`: where the rows of line l start in the chunk.
template <class C, class T>
void step(const RecurrentForward& f, int64_t l, int64_t row, int64_t parity, Deal units) {
  using A = acc_t<T>;
  constexpr int kVectors = shape_of<C>().vectors();
  constexpr int64_t kLanes = Vec<A>::kLanes, kPanel = kPanelVectors * kLanes, kHidden = shape_of<C>().hidden * kLanes;
  alignas(64) A z[tile_rows(kVectors) * kPanel];
  const int64_t tiles = tiles_of(f.rows.rows, tile_rows(kVectors)), alive = f.rows.alive_at(l);
  for (int64_t u; (u = units.next()) >= 0;) {
    const int64_t p = u / tiles;
    const Span r = clip(tile_of(f.rows.rows, tiles, u % tiles), alive);
    if (r.begin == r.end) continue;
    const A* x = element<A>(f.projected, (p * f.chunk + row + r.begin) * kPanel);
    gemm_tile_for<A, kVectors, false>(r.end - r.begin)(
        f.H, element<A>(f.hidden[parity], r.begin * f.ld_hidden), f.ld_hidden,
        element<A>(f.packed_hh, p * f.k_hidden * kVectors * kLanes), x + kHidden, kPanel, z + kHidden, kPanel);
    cell_rows<C, T, A>(f, z, x, l, r, p, parity);
  }
}

// project(p): the input part of panel p for all rows.
template <class C, class T, class Project>
MK_INLINE void recall_with(const RecurrentForward& f, Span lines, Span panels, const Project& project) {
  using A = acc_t<T>;
  constexpr int kVectors = shape_of<C>().vectors();
  constexpr int64_t kLanes = Vec<A>::kLanes, kPanel = kPanelVectors * kLanes, kHidden = shape_of<C>().hidden * kLanes;
  const int64_t rows = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(rows, tile_rows(kVectors));
  for (int64_t p = panels.begin; p < panels.end; p++) {
    project(p);
    for (int64_t i = 0; i < tiles; i++) {
      const Span r = tile_of(rows, tiles, i);
      const int64_t at = (p * f.chunk + r.begin) * kPanel + kHidden;
      gemm_tile_for<A, kVectors, false>(r.end - r.begin)(f.H, element<A>(f.known, r.begin * f.ld_hidden), f.ld_hidden,
                                                         element<A>(f.packed_hh, p * f.k_hidden * kVectors * kLanes),
                                                         element<A>(f.projected, at), kPanel, element<A>(f.z, at),
                                                         kPanel);
    }
    recall_cells<C, T, A>(f, f.projected, lines, p);
  }
}

template <class C, class T>
void recall(const RecurrentForward& f, Span lines, Span panels) {
  const int64_t tiles = tiles_of((lines.end - lines.begin) * f.rows.rows, tile_rows(shape_of<C>().vectors()));
  recall_with<C, T>(f, lines, panels, [&](int64_t p) { project<C, T>(f, lines, {p * tiles, (p + 1) * tiles}); });
}

template <class T>
void gather_known(const RecurrentForward& f, Span lines, Span rows) {
  known_rows<T, acc_t<T>>(f, lines, rows);
}

template <class C, class T>
void start(const RecurrentForward& f, Span rows) {
  start_rows<C, T, acc_t<T>>(f, rows);
}

template <class T>
constexpr RecurrentFormat format_of(int64_t chunk_rows, bool gather) {
  return {Vec<acc_t<T>>::kLanes,
          sizeof(acc_t<T>),
          sizeof(acc_t<T>),
          1,
          chunk_rows,
          {tile_rows(4), tile_rows(3), tile_rows(4)},
          tile_rows(2),
          tile_rows(2),
          1,
          gather,
          0,
          0,
          0,
          0};
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
