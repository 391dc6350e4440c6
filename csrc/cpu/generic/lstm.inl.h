// lstm, forward and table, for levels without matrix units; csrc/cpu/lstm.h says how the work is cut.
//
// A rank owns (panel, row tile) units: the register tile holds i, f, g, o of its units, so a cell is finished where its
// sums are. Bytes: weights are read from cache each step, the input once a chunk; outputs are written once. Precision:
// products and sums in A, activations in A, c carried in A, h exchanged in P.
#if defined(__AVX512F__)
#include "cpu/avx512/transpose.h"
#endif
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/lstm_backward.inl.h"
#include "cpu/generic/lstm_cell.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The block [16 units][count] of one gate by transposition in registers, where the level can; false: not done.
template <class T>
MK_INLINE bool pack_gate_blocks(const T*, int64_t, int64_t, int64_t, acc_t<T>*) {
  return false;
}
#if defined(__AVX512F__)
MK_INLINE bool pack_gate_blocks(const float* from, int64_t stride, int64_t units, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += 16) {
    const int64_t left = smaller(16, count - k);
    __m512i words[16];
    for (int64_t l = 0; l < 16; l++)
      words[l] =
          l < units ? _mm512_castps_si512(Vec<float>::load(from + l * stride + k, left).v) : _mm512_setzero_si512();
    transpose_words(words);
    for (int64_t j = 0; j < left; j++) _mm512_storeu_si512(out + (k + j) * 64, words[j]);
  }
  return true;
}
#endif

// One panel of a weight matrix: out[k][gate][lane] = weight[gate * H + first + lane][k], zero for units past H.
template <class T>
void pack_gates(const T* weight, int64_t stride, int64_t hidden, int64_t first, int64_t count, acc_t<T>* out) {
  constexpr int64_t kLanes = Vec<acc_t<T>>::kLanes;
  for (int64_t gate = 0; gate < 4; gate++) {
    const int64_t units = smaller(kLanes, hidden - first);
    const T* from = weight + (gate * hidden + first) * stride;
    if (pack_gate_blocks(from, stride, units, count, out + gate * kLanes)) continue;
    for (int64_t k = 0; k < count; k++) {
      acc_t<T>* to = out + (k * 4 + gate) * kLanes;
      for (int64_t l = 0; l < units; l++) to[l] = acc_t<T>(to_float(from[l * stride + k]));
      for (int64_t l = units; l < kLanes; l++) to[l] = 0;
    }
  }
}

template <class T>
void pack_bias(const LstmForward& f, int64_t p) {
  using V = Vec<acc_t<T>>;
  acc_t<T>* bias = element<acc_t<T>>(f.bias, p * 4 * V::kLanes);
  const int64_t left = smaller(V::kLanes, f.H - p * V::kLanes);
  for (int64_t gate = 0; gate < 4; gate++) {
    const int64_t at = gate * f.H + p * V::kLanes;
    V sum = f.bias_ih ? V::load(element<T>(f.bias_ih, at), left) : V::zero();
    if (f.bias_hh) sum = sum + V::load(element<T>(f.bias_hh, at), left);
    sum.store(bias + gate * V::kLanes);
  }
}

template <class T>
void lstm_pack(const LstmForward& f, Span panels) {
  using A = acc_t<T>;
  constexpr int64_t kLanes = Vec<A>::kLanes;
  for (int64_t p = panels.begin; p < panels.end; p++) {
    pack_gates<T>(element<T>(f.weight_ih, 0), f.weight_ih_n, f.H, p * kLanes, f.I,
                  element<A>(f.packed_ih, p * f.k_input * 4 * kLanes));
    pack_gates<T>(element<T>(f.weight_hh, 0), f.weight_hh_n, f.H, p * kLanes, f.H,
                  element<A>(f.packed_hh, p * f.k_hidden * 4 * kLanes));
    pack_bias<T>(f, p);
  }
}

// Rows of the chunk `steps` in the element type of the operands.
template <class T>
void lstm_gather(const LstmForward& f, Span steps, Span rows) {
  using V = Vec<acc_t<T>>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t t = steps.begin + row / f.rows.B, b = row % f.rows.B;
    const T* from = element<T>(f.input, t * f.input_t + b * f.input_b);
    acc_t<T>* to = element<acc_t<T>>(f.x, row * f.ld_x);
    for_each_vec<V>(f.I, [&](int64_t j, auto part) { store(load<V>(from + j, part), to + j, part); });
  }
}

template <class T>
void lstm_project(const LstmForward& f, Span steps, Span units) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 4 * Vec<A>::kLanes;
  const int64_t rows = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(rows, tile_rows(4));
  // Without a gathered copy (float, double) the operand is the input, whose rows then have one stride.
  const A* x = f.x ? element<A>(f.x, 0) : element<A>(f.input, steps.begin * f.input_t);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span r = tile_of(rows, tiles, u % tiles);
    gemm_tile_for<A, 4, false>(r.end - r.begin)(
        f.I, x + r.begin * f.ld_x, f.ld_x, element<A>(f.packed_ih, p * f.k_input * kPanel),
        element<A>(f.bias, p * kPanel), 0, element<A>(f.projected, (p * f.chunk + r.begin) * kPanel), kPanel);
  }
}

// `row`: where the rows of step t start in the chunk.
template <class T>
void lstm_step(const LstmForward& f, int64_t t, int64_t row, int64_t parity, Span units) {
  using A = acc_t<T>;
  constexpr int64_t kPanel = 4 * Vec<A>::kLanes;
  alignas(64) A z[tile_rows(4) * kPanel];
  const int64_t tiles = tiles_of(f.rows.B, tile_rows(4));
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span b = tile_of(f.rows.B, tiles, u % tiles);
    gemm_tile_for<A, 4, false>(b.end - b.begin)(f.H, element<A>(f.hidden[parity], b.begin * f.ld_hidden), f.ld_hidden,
                                                element<A>(f.packed_hh, p * f.k_hidden * kPanel),
                                                element<A>(f.projected, (p * f.chunk + row + b.begin) * kPanel), kPanel,
                                                z, kPanel);
    cell_rows<T, A>(f, z, t, b, p, parity);
  }
}

template <class T>
void start(const LstmForward& f, Span rows) {
  lstm_start<T, acc_t<T>>(f, rows);
}

template <class T>
constexpr LstmFormat format_of(int64_t chunk_rows, bool gather) {
  return {Vec<acc_t<T>>::kLanes,
          sizeof(acc_t<T>),
          sizeof(acc_t<T>),
          1,
          chunk_rows,
          tile_rows(4),
          tile_rows(2),
          tile_rows(2),
          1,
          gather,
          0};
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
