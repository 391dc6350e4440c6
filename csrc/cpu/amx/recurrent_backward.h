// The recurrent family backward in bfloat16 on AMX tiles.
#pragma once
#include "cpu/amx/recurrent_tiles.h"
#include "cpu/generic/recurrent_backward.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

void pack_backward_tiles(const RecurrentBackward& f, Span panels) {
  const int64_t hidden_panels = tiles_of(f.H, 32);
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const bool input = p >= hidden_panels;
    const int64_t q = input ? p - hidden_panels : p, stride = input ? f.weight_ih_n : f.weight_hh_n;
    const B16* weight = element<B16>(input ? f.weight_ih : f.weight_hh, 0);
    pack_column_tiles([&](int64_t k) { return weight + (input ? f.input_row(k) : k) * stride; }, f.gate_rows(), q * 32,
                      input ? f.I : f.H, element<B16>(input ? f.packed_ih : f.packed_hh, q * f.k_gates * 32));
  }
}

void start_backward_tiles(const RecurrentBackward& f, Span rows) {
  start_backward<B16>(f, rows);
  if (rows.begin > 0) return;
  // The products run over whole blocks of k: what pads dz meets zero weights and must be finite.
  for (void* dz : f.dz)
    for (int64_t r = 0; r < f.chunk; r++)
      std::memset(element<B16>(dz, r * f.ld_gates + f.columns()), 0, size_t(f.ld_gates - f.columns()) * 2);
}

template <class C>
void gates_backward_tiles(const RecurrentBackward& f, int64_t l, void* dz, Span units) {
  const int64_t tiles = tiles_of(f.rows.rows, kRows);
  for (int64_t u = units.begin; u < units.end; u++)
    panel_gradients<C, B16>(f, l, static_cast<B16*>(dz), rows_of(f.rows.rows, u % tiles), u / tiles);
}

void state_backward_tiles(const RecurrentBackward& f, int64_t l, const void* dz, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 64];
  const int64_t tiles = tiles_of(f.rows.rows, kRows), depth = depth_of(f.gate_rows()), panel = f.k_gates * 32;
  const B16* gradients = element<B16>(dz, f.hidden_column());
  const Sweep sweep{units, l % 2 != 0};
  if (sweep.count() > 0) fetch_rows(gradients, f.ld_gates, f.gate_rows(), rows_of(f.rows.rows, sweep[0] % tiles));
  for (int64_t i = 0; i < sweep.count();) {
    // One block of rows takes two panels at once, for four independent chains of sums; the next panel may be another
    // rank's.
    const bool two = f.rows.rows <= kBlock && i + 1 < sweep.count();
    const int64_t u = two ? smaller(sweep[i], sweep[i + 1]) : sweep[i], p = u / tiles, width = two ? 64 : 32;
    i += two ? 2 : 1;
    const Span r = clip(rows_of(f.rows.rows, u % tiles), f.rows.alive_at(l));
    if (r.begin == r.end) continue;
    const B16 *a = gradients + r.begin * f.ld_gates, *weight = element<B16>(f.packed_hh, p * panel);
    zero_sums();
    if (two) {
      add_row(depth, a, f.ld_gates, weight, 2 * kTile, panel);
      store_row(product, 64);
    } else {
      const int64_t below = r.end - r.begin > kBlock ? kBlock * f.ld_gates : 0;
      add_square(depth, a, f.ld_gates, kDepth, below, weight, 2 * kTile);
      store_square(product, 64);
    }
    pass_back<B16>(f, l, r, p * 32, width, product, 64);
  }
}

// dz of a chunk as left tiles of dz^T: [block of 16 gates][block of 32 rows][gate][row].
void transpose_tiles(const RecurrentBackward& f, const void* dz, int64_t rows, Span columns) {
  const int64_t depth = depth_of(rows);
  for (int64_t n = columns.begin; n < columns.end; n += kBlock)
    for (int64_t block = 0; block < depth; block++) {
      __m512i words[16];
      for (int64_t pair = 0; pair < 16; pair++) {
        const int64_t row = block * kDepth + 2 * pair;
        const B16* from = element<B16>(dz, row * f.ld_gates + n);
        words[pair] = pair_rows(row < rows ? from : nullptr, row + 1 < rows ? from + f.ld_gates : nullptr,
                                smaller(kBlock, f.columns() - n));
      }
      transpose_words(words);
      B16* to = element<B16>(f.transposed, (n / kBlock * depth + block) * kTile);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + i * kDepth, words[i]);
    }
}

// Units: blocks of 32 columns of dz, then panels of x, then panels of the hidden states.
void arrange_tiles(const RecurrentBackward& f, Span lines, const void* dz, void* scratch, Span units) {
  const int64_t blocks = tiles_of(f.columns(), 32), input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t count = (lines.end - lines.begin) * f.rows.rows;
  const B16 **input = static_cast<const B16**>(scratch), **state = input + f.chunk;
  if (units.end > blocks) operand_rows<B16>(f, lines, input, state);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u - blocks;
    if (p < 0) {
      transpose_tiles(f, dz, count, {u * 32, smaller(u * 32 + 32, f.columns())});
      continue;
    }
    const bool hidden = p >= input_panels;
    const B16* const* rows = hidden ? state : input;
    pack_column_tiles([&](int64_t row) { return rows[row]; }, count, (hidden ? p - input_panels : p) * 32,
                      hidden ? f.H : f.I, element<B16>(f.operand, p * f.chunk * 32));
  }
}

// A rank goes through dz once, all its panels at each block of rows: its weights stay in cache from block to block.
void input_backward_tiles(const RecurrentBackward& f, Span lines, const void* dz, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 32];
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(count, kRows);
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t p = units.begin / tiles; p < tiles_of(units.end, tiles); p++) {
      if (p * tiles + tile < units.begin || p * tiles + tile >= units.end) continue;
      const Span rows = rows_of(count, tile);
      zero_sums();
      add_square(depth_of(f.gate_rows()), element<B16>(dz, rows.begin * f.ld_gates), f.ld_gates, kDepth,
                 rows.end - rows.begin > kBlock ? kBlock * f.ld_gates : 0,
                 element<B16>(f.packed_ih, p * f.k_gates * 32), 2 * kTile);
      store_square(product, 32);
      for (int64_t r = rows.begin; r < rows.end; r++)
        store_input_gradient<B16>(f, lines, r, p * 32, 32, product + (r - rows.begin) * 32);
    }
}

void bias_backward_tiles(const RecurrentBackward& f, Span lines, const void* dz, Span columns) {
  sum_columns<B16>(f, lines, static_cast<const B16*>(dz), columns);
}

// A block of 32 columns of dz against a panel of 32 columns of x or the states.
struct GradientBlock {
  Span columns;
  bool hidden, used, whole;  // used: some of its columns are in this weight; whole: all 32, in order
  int64_t first, width;
  float* sums;  // of the first column, where whole
};
MK_INLINE GradientBlock gradient_block(const RecurrentBackward& f, int64_t u, int64_t panels, int64_t input_panels) {
  const int64_t p = u % panels;
  const bool hidden = p >= input_panels;
  const Span columns = rows_of(f.columns(), u / panels);
  const int64_t width = hidden ? f.H : f.I, first = (hidden ? p - input_panels : p) * 32;
  const int64_t begin = hidden ? f.hidden_column() : 0, end = begin + f.gate_rows();
  const int64_t row = hidden ? columns.begin - begin : f.input_row(columns.begin);
  const bool inside = columns.begin >= begin && columns.begin + kRows <= end;
  const bool ordered = hidden || f.input_row(columns.begin + kRows - 1) == row + kRows - 1;
  return {columns,
          hidden,
          columns.end > begin && columns.begin < end,
          inside && ordered && first + 32 <= width,
          first,
          width,
          inside ? element<float>(hidden ? f.sum_hh : f.sum_ih, row * width + first) : nullptr};
}

// Units: blocks of columns of dz, each with all panels: a block of dz^T stays in the first cache, the panels in the
// second.
void weight_backward_tiles(const RecurrentBackward& f, Span lines, const void*, void*, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 32];
  const int64_t input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t panels = input_panels + (f.sum_hh ? tiles_of(f.H, 32) : 0);
  const int64_t depth = depth_of((lines.end - lines.begin) * f.rows.rows);
  const bool fresh = f.first_chunk(lines);
  for (int64_t u = units.begin; u < units.end; u++) {
    const GradientBlock block = gradient_block(f, u, panels, input_panels);
    if (!block.used) continue;
    // The next sums come into cache while these are computed.
    const GradientBlock next = gradient_block(f, smaller(u + 1, units.end - 1), panels, input_panels);
    Prefetch prefetch(next.sums, next.width * 4, 2, next.whole ? kRows : 0, depth);
    // Whole blocks add to the sums in the tile registers.
    if (block.whole && !fresh)
      load_square(block.sums, block.width);
    else
      zero_sums();
    add_square(depth, element<B16>(f.transposed, block.columns.begin / kBlock * depth * kTile), kDepth, kTile,
               block.columns.end - block.columns.begin > kBlock ? depth * kTile : 0,
               element<B16>(f.operand, u % panels * f.chunk * 32), 2 * kTile, prefetch);
    store_square(block.whole ? block.sums : product, block.whole ? block.width : 32);
    if (!block.whole) add_weight_gradient<B16>(f, block.hidden, fresh, block.columns, block.first, 32, product);
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
