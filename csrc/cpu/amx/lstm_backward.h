// lstm backward in bfloat16 on AMX tiles.
#pragma once
#include "cpu/amx/lstm_tiles.h"
#include "cpu/generic/lstm_backward.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

void pack_backward_tiles(const LstmBackward& f, Span panels) {
  const int64_t hidden_panels = tiles_of(f.H, 32);
  for (int64_t p = panels.begin; p < panels.end; p++) {
    const bool input = p >= hidden_panels;
    const int64_t q = input ? p - hidden_panels : p, stride = input ? f.weight_ih_n : f.weight_hh_n;
    const B16* weight = element<B16>(input ? f.weight_ih : f.weight_hh, 0);
    pack_column_tiles([&](int64_t k) { return weight + k * stride; }, 4 * f.H, q * 32, input ? f.I : f.H,
                      element<B16>(input ? f.packed_ih : f.packed_hh, q * f.k_gates * 32));
  }
}

void start_backward_tiles(const LstmBackward& f, Span rows) {
  start_backward<B16>(f, rows);
  if (rows.begin > 0) return;
  // The products run over whole blocks of k: what pads dz meets zero weights and must be finite.
  for (void* dz : f.dz)
    for (int64_t r = 0; r < f.chunk; r++)
      std::memset(element<B16>(dz, r * f.ld_gates + 4 * f.H), 0, size_t(f.ld_gates - 4 * f.H) * 2);
}

void gates_backward_tiles(const LstmBackward& f, int64_t t, void* dz, Span units) {
  const int64_t tiles = tiles_of(f.rows.B, kRows);
  for (int64_t u = units.begin; u < units.end; u++)
    panel_gradients<B16>(f, t, static_cast<B16*>(dz), rows_of(f.rows.B, u % tiles), u / tiles);
}

void state_backward_tiles(const LstmBackward& f, int64_t t, const void* dz, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 64];
  const int64_t tiles = tiles_of(f.rows.B, kRows), depth = depth_of(4 * f.H), panel = f.k_gates * 32;
  if (units.begin < units.end)
    fetch_rows(static_cast<const B16*>(dz), f.ld_gates, 4 * f.H, rows_of(f.rows.B, units.begin % tiles));
  for (int64_t u = units.begin; u < units.end;) {
    const int64_t p = u / tiles;
    const Span b = rows_of(f.rows.B, u % tiles);
    const B16 *a = element<B16>(dz, b.begin * f.ld_gates), *weight = element<B16>(f.packed_hh, p * panel);
    // One block of rows takes two panels at once, for four independent chains of sums; the next panel may be another
    // rank's.
    const int64_t width = b.end - b.begin <= kBlock && tiles == 1 && u + 1 < units.end ? 64 : 32;
    if (width == 64) {
      zero_sums();
      add_row(depth, a, f.ld_gates, weight, 2 * kTile, panel);
      store_row(product, 64);
    } else {
      const int64_t below = b.end - b.begin > kBlock ? kBlock * f.ld_gates : 0;
      zero_sums();
      add_square(depth, a, f.ld_gates, kDepth, below, weight, 2 * kTile);
      store_square(product, 64);
    }
    for (int64_t r = b.begin; r < b.end; r++)
      for (int64_t j = 0; j < width; j += kBlock)
        pass_back(f, t, r, Vec<float>::load(product + (r - b.begin) * 64 + j),
                  element<float>(f.dh, r * f.ld_hidden + p * 32 + j));
    u += width / 32;
  }
}

// dz of a chunk as left tiles of dz^T: [block of 16 gates][block of 32 rows][gate][row].
void transpose_tiles(const LstmBackward& f, const void* dz, int64_t rows, Span columns) {
  const int64_t depth = depth_of(rows);
  for (int64_t n = columns.begin; n < columns.end; n += kBlock)
    for (int64_t block = 0; block < depth; block++) {
      __m512i words[16];
      for (int64_t pair = 0; pair < 16; pair++) {
        const int64_t row = block * kDepth + 2 * pair;
        const B16* from = element<B16>(dz, row * f.ld_gates + n);
        words[pair] = pair_rows(row < rows ? from : nullptr, row + 1 < rows ? from + f.ld_gates : nullptr,
                                smaller(kBlock, 4 * f.H - n));
      }
      transpose_words(words);
      B16* to = element<B16>(f.transposed, (n / kBlock * depth + block) * kTile);
      for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(to + i * kDepth, words[i]);
    }
}

// Units: blocks of 32 gates of dz^T, then panels of x, then panels of the hidden states.
void arrange_tiles(const LstmBackward& f, Span steps, const void* dz, void* scratch, Span units) {
  const int64_t gate_blocks = tiles_of(4 * f.H, 32), input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t count = (steps.end - steps.begin) * f.rows.B;
  const B16 **input = static_cast<const B16**>(scratch), **state = input + f.chunk;
  if (units.end > gate_blocks) operand_rows<B16>(f, steps, input, state);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u - gate_blocks;
    if (p < 0) {
      transpose_tiles(f, dz, count, {u * 32, smaller(u * 32 + 32, 4 * f.H)});
      continue;
    }
    const bool hidden = p >= input_panels;
    const B16* const* rows = hidden ? state : input;
    pack_column_tiles([&](int64_t row) { return rows[row]; }, count, (hidden ? p - input_panels : p) * 32,
                      hidden ? f.H : f.I, element<B16>(f.operand, p * f.chunk * 32));
  }
}

// A rank goes through dz once, all its panels at each block of rows: its weights stay in cache from block to block.
void input_backward_tiles(const LstmBackward& f, Span steps, const void* dz, Span units) {
  const Tiles shape;
  using V = Vec<float>;
  alignas(64) float product[kRows * 32];
  const int64_t count = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(count, kRows);
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t p = units.begin / tiles; p < tiles_of(units.end, tiles); p++) {
      if (p * tiles + tile < units.begin || p * tiles + tile >= units.end) continue;
      const Span rows = rows_of(count, tile);
      zero_sums();
      add_square(depth_of(4 * f.H), element<B16>(dz, rows.begin * f.ld_gates), f.ld_gates, kDepth,
                 rows.end - rows.begin > kBlock ? kBlock * f.ld_gates : 0,
                 element<B16>(f.packed_ih, p * f.k_gates * 32), 2 * kTile);
      store_square(product, 32);
      for (int64_t r = rows.begin; r < rows.end; r++) {
        B16* out = element<B16>(f.dinput, (steps.begin * f.rows.B + r) * f.I + p * 32);
        for_each_vec<V>(smaller(32, f.I - p * 32), [&](int64_t j, auto part) {
          store(V::load(product + (r - rows.begin) * 32 + j), out + j, part);
        });
      }
    }
}

void bias_backward_tiles(const LstmBackward& f, Span steps, const void* dz, Span columns) {
  sum_columns<B16>(f, steps, static_cast<const B16*>(dz), columns);
}

// Units: row blocks of dW, each with all panels: a block of dz^T stays in the first cache, the panels in the second.
void weight_backward_tiles(const LstmBackward& f, Span steps, const void*, void*, Span units) {
  const Tiles shape;
  using V = Vec<float>;
  alignas(64) float product[kRows * 32];
  const int64_t input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t panels = input_panels + (f.sum_hh ? tiles_of(f.H, 32) : 0);
  const int64_t depth = depth_of((steps.end - steps.begin) * f.rows.B);
  const bool fresh = f.first_chunk(steps);
  struct Block {
    Span rows;
    int64_t width, first;
    float* sums;
  };
  const auto block = [&](int64_t u) -> Block {
    const int64_t p = u % panels;
    const bool hidden = p >= input_panels;
    const Span rows = rows_of(4 * f.H, u / panels);
    const int64_t width = hidden ? f.H : f.I, first = (hidden ? p - input_panels : p) * 32;
    return {rows, width, first, element<float>(hidden ? f.sum_hh : f.sum_ih, rows.begin * width + first)};
  };
  for (int64_t u = units.begin; u < units.end; u++) {
    const auto [rows, width, first, total] = block(u);
    // The next sums come into cache while these are computed.
    const Block next = block(smaller(u + 1, units.end - 1));
    Prefetch prefetch(next.sums, next.width * 4, 2, next.rows.end - next.rows.begin, depth);
    const bool whole = rows.end - rows.begin == kRows && first + 32 <= width;
    // Whole blocks add to the sums in the tile registers.
    if (whole && !fresh)
      load_square(total, width);
    else
      zero_sums();
    add_square(depth, element<B16>(f.transposed, rows.begin / kBlock * depth * kTile), kDepth, kTile,
               rows.end - rows.begin > kBlock ? depth * kTile : 0, element<B16>(f.operand, u % panels * f.chunk * 32),
               2 * kTile, prefetch);
    store_square(whole ? total : product, whole ? width : 32);
    if (whole) continue;
    for (int64_t n = 0; n < rows.end - rows.begin; n++)
      for_each_vec<V>(smaller(32, width - first), [&](int64_t j, auto part) {
        const V sum = V::load(product + n * 32 + j);
        store(fresh ? sum : load<V>(total + n * width + j, part) + sum, total + n * width + j, part);
      });
  }
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
