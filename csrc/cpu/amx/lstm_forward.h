// lstm forward in bfloat16 on AMX tiles. z of a panel (16 units, 4 gates) is 4 sum tiles a block of 16 rows: side by
// side for one block, in two passes of 2 x 2 for two. The cells of a panel are computed beside the product of the next.
#pragma once
#include "cpu/amx/lstm_tiles.h"
#include "cpu/generic/lstm.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// One panel of 16 units of a gate matrix: [k block][gate][pair of k][unit][2].
void pack_gate_tiles(const B16* weight, int64_t stride, int64_t hidden, int64_t first, int64_t count, B16* out) {
  const int64_t units = smaller(kBlock, hidden - first);
  for (int64_t k = 0; k < count; k += kDepth)
    for (int64_t gate = 0; gate < 4; gate++, out += kTile) {
      const B16* from = weight + (gate * hidden + first) * stride + k;
      const __mmask32 mask = _bzhi_u32(~0u, unsigned(smaller(kDepth, count - k)));
      __m512i words[16];
      for (int64_t l = 0; l < kBlock; l++)
        words[l] = l < units ? _mm512_maskz_loadu_epi16(mask, from + l * stride) : _mm512_setzero_si512();
      transpose_words(words);
      for (int64_t l = 0; l < kBlock; l++) _mm512_storeu_si512(out + l * kDepth, words[l]);
    }
}

// One factor of z: rows of `a` times a packed panel of gates.
struct GateFactor {
  const B16* a;
  int64_t lda, depth;
  const B16* panel;
};

// z of up to 32 rows of a panel: [row][gate][unit] float, the sum of the factors in their order on top of `init`.
template <int N, class Beside = Nothing>
MK_INLINE void gate_product(int64_t rows, const GateFactor (&factors)[N], const float* init, int64_t ldi, float* c,
                            Beside&& beside = {}) {
  constexpr int64_t kPanel = 4 * kBlock;
  if (rows <= kBlock) {
    load_row(init, ldi);
    for (const GateFactor& f : factors) add_row(f.depth, f.a, f.lda, f.panel, 4 * kTile, 2 * kTile, beside);
    return store_row(c, kPanel);
  }
  for (int64_t half = 0; half < 2; half++) {
    load_square(init + half * 32, ldi);
    for (const GateFactor& f : factors)
      add_square(f.depth, f.a, f.lda, kDepth, kBlock * f.lda, f.panel + half * 2 * kTile, 4 * kTile, beside);
    store_square(c + half * 32, kPanel);
  }
}

void pack_tiles(const LstmForward& f, Span panels) {
  for (int64_t p = panels.begin; p < panels.end; p++) {
    pack_gate_tiles(element<B16>(f.weight_ih, 0), f.weight_ih_n, f.H, p * kBlock, f.I,
                    element<B16>(f.packed_ih, p * f.k_input * 64));
    pack_gate_tiles(element<B16>(f.weight_hh, 0), f.weight_hh_n, f.H, p * kBlock, f.H,
                    element<B16>(f.packed_hh, p * f.k_hidden * 64));
    pack_bias<B16>(f, p);
  }
}

void start_tiles(const LstmForward& f, Span rows) { lstm_start<B16, B16>(f, rows); }

void gather_tiles(const LstmForward& f, Span steps, Span rows) {
  using V = Vec<float>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t t = steps.begin + row / f.rows.B, b = row % f.rows.B;
    const B16* from = element<B16>(f.input, t * f.input_t + b * f.input_b);
    B16* to = element<B16>(f.x, row * f.ld_x);
    for (int64_t j = 0; j < f.k_input; j += V::kLanes) {
      const int64_t left = f.I - j < 0 ? 0 : smaller(f.I - j, V::kLanes);
      _mm256_storeu_si256((__m256i*)(to + j), _mm256_maskz_loadu_epi16(V::first(left), from + smaller(j, f.I)));
    }
  }
}

void project_tiles(const LstmForward& f, Span steps, Span units) {
  const Tiles shape;
  const int64_t rows = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(rows, kRows), depth = depth_of(f.I);
  const B16* x = f.x ? element<B16>(f.x, 0) : element<B16>(f.input, steps.begin * f.input_t);
  const auto out = [&](int64_t u) {
    return element<float>(f.projected, (u / tiles * f.chunk + rows_of(rows, u % tiles).begin) * 64);
  };
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span r = rows_of(rows, u % tiles);
    // The weights have pushed what is written next out of the cache: stores would wait for it.
    Prefetch prefetch(out(u + 1), 256, 4, u + 1 < units.end ? kRows : 0, 2 * depth);
    gate_product<1>(r.end - r.begin,
                    {{x + r.begin * f.ld_x, f.ld_x, depth, element<B16>(f.packed_ih, p * f.k_input * 64)}},
                    element<float>(f.bias, p * 64), 0, out(u), prefetch);
  }
}

// The cells of one unit of work, a few rows at a time.
class UnitCells {
 public:
  // No more than `calls` advances are needed.
  void start(const float* z, Span rows, int64_t panel, int64_t calls) {
    z_ = z, rows_ = rows, panel_ = panel, each_ = (rows.end - rows.begin + calls - 1) / calls;
  }
  MK_INLINE void advance(const LstmForward& f, int64_t t, int64_t parity) {
    if (rows_.begin < rows_.end) run(f, t, parity, smaller(rows_.begin + each_, rows_.end));
  }
  MK_INLINE void finish(const LstmForward& f, int64_t t, int64_t parity) {
    if (rows_.begin < rows_.end) run(f, t, parity, rows_.end);
  }

 private:
  __attribute__((noinline)) void run(const LstmForward& f, int64_t t, int64_t parity, int64_t end) {
    cell_rows<B16, B16>(f, z_, t, {rows_.begin, end}, panel_, parity);
    z_ += (end - rows_.begin) * 64, rows_.begin = end;
  }
  const float* z_ = nullptr;
  Span rows_{0, 0};
  int64_t panel_ = 0, each_ = 0;
};

// What a later product reads, brought in beside that of unit u: x of the next step, of which every unit takes a share
// of the rows, or what was projected for the unit after u.
MK_INLINE Prefetch prefetch_beside(const LstmForward& f, int64_t t, int64_t row, int64_t u, Span units, int64_t calls) {
  const int64_t tiles = tiles_of(f.rows.B, kRows), next = u + 1;
  if (f.fused) {
    const Span share = tile_of(f.rows.B, units.end - units.begin, u - units.begin);
    const int64_t after = f.rows.next(t);
    const bool some = after >= 0 && after < f.rows.T;
    return {element<B16>(f.input, (some ? after : t) * f.input_t + share.begin * f.input_b), f.input_b * 2, f.I / 32,
            some ? share.end - share.begin : 0, calls};
  }
  const Span b = rows_of(f.rows.B, next % tiles);
  return {element<float>(f.projected, (next / tiles * f.chunk + row + b.begin) * 64), 256, 4,
          next < units.end ? b.end - b.begin : 0, calls};
}

void step_tiles(const LstmForward& f, int64_t t, int64_t row, int64_t parity, Span units) {
  const Tiles shape;
  alignas(64) float z[2][kRows * 64];
  const int64_t tiles = tiles_of(f.rows.B, kRows), input_depth = depth_of(f.I), depth = depth_of(f.H);
  if (units.begin < units.end)
    fetch_rows(element<B16>(f.hidden[parity], 0), f.ld_hidden, f.H, rows_of(f.rows.B, units.begin % tiles));
  UnitCells cells;
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span b = rows_of(f.rows.B, u % tiles);
    const int64_t calls = (f.fused ? input_depth + depth : depth) * (b.end - b.begin > kBlock ? 2 : 1);
    Prefetch prefetch = prefetch_beside(f, t, row, u, units, calls);
    const auto beside = [&] { cells.advance(f, t, parity), prefetch(); };
    const GateFactor state{element<B16>(f.hidden[parity], b.begin * f.ld_hidden), f.ld_hidden, depth,
                           element<B16>(f.packed_hh, p * f.k_hidden * 64)};
    float* sums = z[u % 2];
    if (f.fused) {
      const B16* x = element<B16>(f.input, t * f.input_t + b.begin * f.input_b);
      gate_product<2>(b.end - b.begin,
                      {{x, f.input_b, input_depth, element<B16>(f.packed_ih, p * f.k_input * 64)}, state},
                      element<float>(f.bias, p * 64), 0, sums, beside);
    } else {
      gate_product<1>(b.end - b.begin, {state}, element<float>(f.projected, (p * f.chunk + row + b.begin) * 64), 64,
                      sums, beside);
    }
    cells.finish(f, t, parity);
    cells.start(sums, b, p, calls);
  }
  cells.finish(f, t, parity);
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
