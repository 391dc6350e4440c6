// The recurrent family forward in bfloat16 on AMX tiles. z of a panel is a sum tile a vector and block of 16 rows: four
// vectors side by side for one block, in two passes of 2 x 2 for two; three vectors of one or two blocks at once. The
// cells of a panel are computed beside the product of the next.
#pragma once
#include "cpu/amx/recurrent_tiles.h"
#include "cpu/generic/recurrent.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class C>
constexpr int64_t kWide = kBlock* shape_of<C>().vectors();  // columns of a product
constexpr int64_t kPanel = kBlock * kPanelVectors;

// One panel of a gate matrix: [k block][vector][pair of k][unit][2].
template <class C>
void pack_gate_tiles(const B16* weight, int64_t stride, int64_t hidden, int64_t p, int64_t rotation, int64_t count,
                     B16* out) {
  for (int64_t k = 0; k < count; k += kDepth)
    for (int64_t v = 0; v < shape_of<C>().vectors(); v++, out += kTile) {
      const auto [row, units] = gate_vector<C>(hidden, kBlock, p, v, rotation);
      const B16* from = weight + row * stride + k;
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

// The sum of the factors in their order on top of `init`, for up to 32 rows of a panel: c is [row][4 vectors].
template <int N, class Beside = Nothing>
MK_INLINE void four_product(int64_t rows, const GateFactor (&factors)[N], const float* init, int64_t ldi, float* c,
                            Beside&& beside = {}) {
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

// The same with three vectors.
template <class Beside = Nothing>
MK_INLINE void three_product(int64_t rows, const GateFactor& f, const float* init, int64_t ldi, float* c,
                             Beside&& beside = {}) {
  const bool below = rows > kBlock;
  load_three(init, ldi, below);
  add_three(f.depth, f.a, f.lda, below ? kBlock * f.lda : 0, f.panel, beside);
  store_three(c, kPanel, below);
}

template <class C>
void pack_tiles(const RecurrentForward& f, Span panels) {
  for (int64_t p = panels.begin; p < panels.end; p++) {
    pack_gate_tiles<C>(element<B16>(f.weight_ih, 0), f.weight_ih_n, f.H, p, shape_of<C>().rotation, f.I,
                       element<B16>(f.packed_ih, p * f.k_input * kWide<C>));
    pack_gate_tiles<C>(element<B16>(f.weight_hh, 0), f.weight_hh_n, f.H, p, 0, f.H,
                       element<B16>(f.packed_hh, p * f.k_hidden * kWide<C>));
    pack_bias<C, B16>(f, p);
    fill_hidden_bias<C, float>(f, p);
  }
}

template <class C>
void start_tiles(const RecurrentForward& f, Span rows) {
  start_rows<C, B16, B16>(f, rows);
}

void gather_tiles(const RecurrentForward& f, Span lines, Span rows) {
  using V = Vec<float>;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const Slot s = f.rows.slot(lines.begin + row / f.rows.rows, row % f.rows.rows);
    const B16* from = s.b < 0 ? nullptr : element<B16>(f.input, s.t * f.input_t + s.b * f.input_b);
    B16* to = element<B16>(f.x, row * f.ld_x);
    for (int64_t j = 0; j < f.k_input; j += V::kLanes) {
      const int64_t left = !from || f.I - j < 0 ? 0 : smaller(f.I - j, V::kLanes);
      const __m256i words = left ? _mm256_maskz_loadu_epi16(V::first(left), from + j) : _mm256_setzero_si256();
      _mm256_storeu_si256((__m256i*)(to + j), words);
    }
  }
}

template <class C>
void project_tiles(const RecurrentForward& f, Span lines, Span units) {
  const Tiles shape;
  const int64_t rows = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(rows, kRows), depth = depth_of(f.I);
  const B16* x = f.x ? element<B16>(f.x, 0) : element<B16>(f.input, lines.begin * f.input_t);
  const auto out = [&](int64_t u) {
    return element<float>(f.projected, (u / tiles * f.chunk + rows_of(rows, u % tiles).begin) * kPanel);
  };
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span r = rows_of(rows, u % tiles);
    // The weights have pushed what is written next out of the cache: stores would wait for it.
    Prefetch prefetch(out(u + 1), 256, 4, u + 1 < units.end ? kRows : 0, 2 * depth);
    const GateFactor input{x + r.begin * f.ld_x, f.ld_x, depth, element<B16>(f.packed_ih, p * f.k_input * kWide<C>)};
    const float* bias = element<float>(f.bias, p * kPanel);
    if constexpr (shape_of<C>().vectors() == kPanelVectors)
      four_product<1>(r.end - r.begin, {input}, bias, 0, out(u), prefetch);
    else
      three_product(r.end - r.begin, input, bias, 0, out(u), prefetch);
  }
}

// The cells of one unit of work, a few rows at a time: beside a product, where their instructions fill the time of the
// matrix unit. That needs them in line, with all they point to in registers.
template <class C>
class UnitCells {
 public:
  UnitCells() = default;
  // No more than `calls` advances are needed.
  MK_INLINE UnitCells(const RecurrentForward& f, const float* z, const float* x, int64_t l, Span rows, int64_t panel,
                      int64_t parity, int64_t calls)
      : open_(f, z, x, l, rows.begin, panel, parity), z_(z), x_(x), rows_(rows), panel_(panel) {
    is_open_ = is_open<C, B16>(f, l, panel), each_ = (rows.end - rows.begin + calls - 1) / calls;
  }
  MK_INLINE void advance(const RecurrentForward& f, int64_t l, int64_t parity) {
    for (int64_t i = 0; i < each_ && rows_.begin < rows_.end; i++) {
      if (is_open_)
        open_.next(f);
      else
        row(f, z_, x_, l, rows_.begin, panel_, parity), z_ += kPanel, x_ += kPanel;
      rows_.begin++;
    }
  }
  MK_INLINE void finish(const RecurrentForward& f, int64_t l, int64_t parity) {
    while (rows_.begin < rows_.end) advance(f, l, parity);
  }

 private:
  // Takes copies: an address of this object that left it would bring its members back into memory.
  static __attribute__((noinline)) void row(const RecurrentForward& f, const float* z, const float* x, int64_t l,
                                            int64_t r, int64_t panel, int64_t parity) {
    cell_rows<C, B16, B16>(f, z, x, l, {r, r + 1}, panel, parity);
  }
  OpenRows<C, B16, B16> open_;
  const float *z_ = nullptr, *x_ = nullptr;
  Span rows_{0, 0};
  int64_t panel_ = 0, each_ = 0;
  bool is_open_ = false;
};

// What a later product reads, brought in beside that of unit u: x of the next step, of which every unit takes a share
// of the rows, or what was projected for unit `next`; -1: none. `i` counts the units of this rank.
MK_INLINE Prefetch prefetch_beside(const RecurrentForward& f, int64_t l, int64_t row, int64_t next, int64_t i,
                                   int64_t units, int64_t calls) {
  const int64_t tiles = tiles_of(f.rows.rows, kRows), unit = next < 0 ? 0 : next;
  if (f.fused) {
    const Span share = i < units ? tile_of(f.rows.rows, units, i) : Span{0, 0};
    const int64_t after = f.rows.next(l);
    const bool some = after >= 0 && after < f.rows.lines;
    return {element<B16>(f.input, (some ? after : l) * f.input_t + share.begin * f.input_b), f.input_b * 2, f.I / 32,
            some ? share.end - share.begin : 0, calls};
  }
  const Span b = rows_of(f.rows.rows, unit % tiles);
  return {element<float>(f.projected, (unit / tiles * f.chunk + row + b.begin) * kPanel), 256, 4,
          next < 0 ? 0 : b.end - b.begin, calls};
}

// z of rows `r` of panel p; x: what was projected for them. A fused run has no x and leaves xn in z.
template <class C, class Beside>
MK_INLINE void step_product(const RecurrentForward& f, int64_t l, Span r, int64_t p, int64_t parity, const float* x,
                            float* z, Beside&& beside) {
  constexpr int64_t kHidden = shape_of<C>().hidden * kBlock;
  const int64_t count = r.end - r.begin;
  const GateFactor state{element<B16>(f.hidden[parity], r.begin * f.ld_hidden), f.ld_hidden, depth_of(f.H),
                         element<B16>(f.packed_hh, p * f.k_hidden * kWide<C>)};
  const GateFactor input{element<B16>(f.input, l * f.input_t + r.begin * f.input_b), f.input_b, depth_of(f.I),
                         element<B16>(f.packed_ih, p * f.k_input * kWide<C>)};
  const float* bias = element<float>(f.bias, p * kPanel);
  if constexpr (shape_of<C>().vectors() == kPanelVectors) {
    if (f.fused)
      four_product<2>(count, {input, state}, bias, 0, z, beside);
    else
      four_product<1>(count, {state}, x, kPanel, z, beside);
  } else if (f.fused) {
    three_product(count, input, bias, 0, z, beside);
    for (int64_t i = 0; i < count; i++) Vec<float>::load(bias + 3 * kBlock).store(z + i * kPanel + 3 * kBlock);
    three_product(count, state, z + kHidden, kPanel, z + kHidden, beside);
  } else {
    three_product(count, state, x + kHidden, kPanel, z + kHidden, beside);
  }
}

template <class C>
void step_tiles(const RecurrentForward& f, int64_t l, int64_t row, int64_t parity, Deal units) {
  const Tiles shape;
  alignas(64) float z[2][kRows * kPanel];
  const int64_t tiles = tiles_of(f.rows.rows, kRows), depth = depth_of(f.H) + (f.fused ? depth_of(f.I) : 0);
  const int64_t alive = f.rows.alive_at(l);
  int64_t next = units.next();
  if (next >= 0) fetch_rows(element<B16>(f.hidden[parity], 0), f.ld_hidden, f.H, rows_of(f.rows.rows, next % tiles));
  UnitCells<C> cells;
  for (int64_t i = 0, turn = 0; next >= 0; i++) {
    const int64_t u = next, p = u / tiles;
    next = units.next();  // one ahead, for what is brought in beside this one's product
    const Span r = clip(rows_of(f.rows.rows, u % tiles), alive);
    if (r.begin == r.end) continue;
    const int64_t calls = depth * (r.end - r.begin > kBlock ? 2 : 1);
    Prefetch prefetch = prefetch_beside(f, l, row, next, i, units.share(), calls);
    const auto beside = [&]() __attribute__((always_inline)) { cells.advance(f, l, parity), prefetch(); };
    const float* x = f.fused ? z[turn] : element<float>(f.projected, (p * f.chunk + row + r.begin) * kPanel);
    step_product<C>(f, l, r, p, parity, x, z[turn], beside);
    cells.finish(f, l, parity);
    cells = UnitCells<C>(f, z[turn], x, l, r, p, parity, calls);
    turn ^= 1;  // by units that have rows: the cells still read the other buffer
  }
  cells.finish(f, l, parity);
}

// As a fused run, whose lines are the rows of the chunk: both factors of z are at hand.
template <class C>
void recall_tiles(const RecurrentForward& f, Span lines, Span panels) {
  const int64_t rows = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(rows, kRows);
  RecurrentForward known = f;
  known.fused = true, known.hidden[0] = f.known, known.input_t = 0, known.input_b = f.ld_x;
  known.input = f.x ? element<B16>(f.x, 0) : element<B16>(f.input, lines.begin * f.input_t);
  for (int64_t p = panels.begin; p < panels.end; p++) {
    {
      const Tiles shape;
      for (int64_t i = 0; i < tiles; i++) {
        const Span r = rows_of(rows, i);
        float* z = element<float>(f.z, (p * f.chunk + r.begin) * kPanel);
        step_product<C>(known, 0, r, p, 0, z, z, Nothing());
      }
    }
    recall_cells<C, B16, B16>(f, f.z, lines, p);
  }
}

void gather_known_tiles(const RecurrentForward& f, Span lines, Span rows) { known_rows<B16, B16>(f, lines, rows); }

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
