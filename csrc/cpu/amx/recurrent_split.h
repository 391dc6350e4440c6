// The products of the recurrent family over a whole chunk in float32 on AMX tiles (amx/split.h). Those of the steps
// stay with the vector units: their weights are read anew each step, and three parts are half as many bytes again.
#pragma once
#include "cpu/amx/recurrent_backward.h"
#include "cpu/amx/recurrent_forward.h"
#include "cpu/amx/split.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// Visits the units u = i * inner + j of a rank so that all i meet one group of j after the other, whose operands of
// `depth` blocks of k stay in the second cache: one(i, j).
template <class One>
MK_INLINE void by_groups(Span units, int64_t inner, int64_t depth, const One& one) {
  constexpr int64_t kBytes = 3 << 18, kOperand = 2 * kSplitTile * int64_t(sizeof(B16));
  const int64_t fits = kBytes / (kOperand * (depth < 1 ? 1 : depth)), group = fits < 1 ? 1 : fits;
  for (int64_t begin = 0; begin < inner; begin += group)
    for (int64_t i = units.begin / inner; i < tiles_of(units.end, inner); i++)
      for (int64_t j = begin; j < smaller(begin + group, inner); j++)
        if (i * inner + j >= units.begin && i * inner + j < units.end) one(i, j);
}

template <class C>
void pack_split(const RecurrentForward& f, Span panels) {
  constexpr int64_t kVectors = shape_of<C>().vectors();
  for (int64_t p = panels.begin; p < panels.end; p++) {
    for (int64_t v = 0; v < kVectors; v++) {
      const auto [row, units] = gate_vector<C>(f.H, kBlock, p, v, shape_of<C>().rotation);
      split_rows(element<float>(f.weight_ih, row * f.weight_ih_n), f.weight_ih_n, units, f.I,
                 element<B16>(f.packed_ih, (p * kVectors + v) * depth_of(f.I) * kSplitTile));
    }
    pack_gates<C, float>(element<float>(f.weight_hh, 0), f.weight_hh_n, f.H, p, 0, f.H,
                         element<float>(f.packed_hh, p * f.k_hidden * kWide<C>));
    pack_bias<C, float>(f, p);
    fill_hidden_bias<C, float>(f, p);
  }
}

MK_INLINE const float* input_row(const RecurrentForward& f, Span lines, int64_t row) {
  const Slot s = f.rows.slot(lines.begin + row / f.rows.rows, row % f.rows.rows);
  return s.b < 0 ? nullptr : element<float>(f.input, s.t * f.input_t + s.b * f.input_b);
}

void gather_split(const RecurrentForward& f, Span lines, Span rows) {
  const int64_t depth = depth_of(f.I);
  for (int64_t row = rows.begin; row < rows.end; row++)
    split_row(input_row(f, lines, row), f.I, depth, element<B16>(f.x, row * depth * kParts * kDepth));
}

// One vector of one row without splitting.
template <class C>
__attribute__((noinline)) void project_plainly(const RecurrentForward& f, const float* x, int64_t vector, float* out) {
  constexpr int64_t kVectors = shape_of<C>().vectors();
  const auto [row, units] = gate_vector<C>(f.H, kBlock, vector / kVectors, vector % kVectors, shape_of<C>().rotation);
  const float* bias = element<float>(f.bias, (vector / kVectors * kPanelVectors + vector % kVectors) * kBlock);
  for (int64_t l = 0; x && l < units; l++) {
    const float* weight = element<float>(f.weight_ih, (row + l) * f.weight_ih_n);
    float sum = 0;
    for (int64_t k = 0; k < f.I; k++) sum = __builtin_fmaf(x[k], weight[k], sum);
    out[l] = sum + bias[l];
  }
}

// Vectors [begin, end) of the columns of all panels, two at a time, for up to 32 rows of the chunk.
template <class C>
void project_vectors(const RecurrentForward& f, Span lines, Span rows, Span vectors) {
  constexpr int64_t kVectors = shape_of<C>().vectors();
  alignas(64) float product[kRows * 32];
  const int64_t depth = depth_of(f.I), column = depth * kSplitTile;
  const SplitLeft x = left_rows(element<B16>(f.x, rows.begin * depth * kParts * kDepth), depth);
  for (int64_t v = vectors.begin; v < vectors.end; v += 2) {
    const int64_t last = smaller(v + 1, vectors.end - 1);
    split_product(depth, x, element<B16>(f.packed_ih, v * column), element<B16>(f.packed_ih, last * column), product);
    for (int64_t w = v; w <= last; w++) {
      const int64_t p = w / kVectors, at = w % kVectors * kBlock;
      const Vec<float> bias = Vec<float>::load(element<float>(f.bias, p * kPanel + at));
      for (int64_t r = rows.begin; r < rows.end; r++) {
        float* out = element<float>(f.projected, (p * f.chunk + r) * kPanel + at);
        const Vec<float> sum = Vec<float>::load(product + (r - rows.begin) * 32 + (w - v) * kBlock);
        (sum + bias).store(out);
        if (broken(sum)) project_plainly<C>(f, input_row(f, lines, r), w, out);
      }
    }
  }
}

// Units: pairs of vectors, each with the row tiles.
template <class C>
void project_split(const RecurrentForward& f, Span lines, Span units) {
  const Tiles shape;
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(count, kRows);
  const int64_t vectors = f.panels * shape_of<C>().vectors();
  by_groups(units, tiles, depth_of(f.I), [&](int64_t pair, int64_t tile) {
    project_vectors<C>(f, lines, rows_of(count, tile), {pair * 2, smaller(pair * 2 + 2, vectors)});
  });
}

template <class C>
void recall_split(const RecurrentForward& f, Span lines, Span panels) {
  recall_with<C, float>(f, lines, panels, [&](int64_t p) {
    const Tiles shape;
    const int64_t count = (lines.end - lines.begin) * f.rows.rows, vectors = shape_of<C>().vectors();
    for (int64_t i = 0; i < tiles_of(count, kRows); i++)
      project_vectors<C>(f, lines, rows_of(count, i), {p * vectors, (p + 1) * vectors});
  });
}

void pack_backward_split(const RecurrentBackward& f, Span panels) {
  const int64_t hidden_panels = tiles_of(f.H, 32), column = depth_of(f.gate_rows()) * kSplitTile;
  pack_backward<float>(f, {panels.begin, smaller(panels.end, hidden_panels)});
  const auto input = [&](int64_t k) { return element<float>(f.weight_ih, f.input_row(k) * f.weight_ih_n); };
  for (int64_t p = panels.begin < hidden_panels ? hidden_panels : panels.begin; p < panels.end; p++)
    for (int64_t half = 0; half < 2; half++) {
      const int64_t q = (p - hidden_panels) * 2 + half;
      split_columns<true>(input, f.gate_rows(), q * kBlock, f.I, element<B16>(f.packed_ih, q * column));
    }
}

// A block of 32 columns of dz: as left operand of the weight gradients (dz^T, in tiles), and of dx (in rows).
void arrange_gradients(const RecurrentBackward& f, const float* dz, int64_t rows, int64_t block) {
  const int64_t depth = depth_of(rows), width = f.columns(), k_blocks = depth_of(f.gate_rows());
  const auto row = [&](int64_t r) { return dz + r * f.ld_gates; };
  for (int64_t n = block * 32; n < smaller(block * 32 + 32, width); n += kBlock)
    split_columns<false>(row, rows, n, width, element<B16>(f.transposed, n / kBlock * depth * kSplitTile));
  for (int64_t r = 0; f.dinput && block < k_blocks && r < rows; r++)
    split_row(row(r) + block * 32, width - block * 32, 1,
              element<B16>(f.left, (r * k_blocks + block) * kParts * kDepth));
}

// Units: blocks of 32 columns of dz, then panels of x, then panels of the hidden states.
void arrange_split(const RecurrentBackward& f, Span lines, const void* dz, void* scratch, Span units) {
  const int64_t blocks = tiles_of(f.columns(), 32), input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, column = depth_of(count) * kSplitTile;
  const float **input = static_cast<const float**>(scratch), **state = input + f.chunk;
  if (units.end > blocks) operand_rows<float>(f, lines, input, state);
  for (int64_t u = units.begin; u < units.end; u++) {
    if (u < blocks) {
      arrange_gradients(f, static_cast<const float*>(dz), count, u);
      continue;
    }
    const int64_t p = u - blocks;
    const bool hidden = p >= input_panels;
    const float* const* rows = hidden ? state : input;
    for (int64_t half = 0; half < 2; half++)
      split_columns<true>([&](int64_t row) { return rows[row]; }, count,
                          ((hidden ? p - input_panels : p) * 2 + half) * kBlock, hidden ? f.H : f.I,
                          element<B16>(f.operand, (p * 2 + half) * column));
  }
}

// Columns [first, first + 32) of dx of one row without splitting.
__attribute__((noinline)) void input_gradient_plainly(const RecurrentBackward& f, const float* dz, int64_t first,
                                                      float* out) {
  const int64_t width = smaller(32, f.I - first);
  for (int64_t j = 0; j < width; j++) out[j] = 0;
  for (int64_t n = 0; n < f.gate_rows(); n++) {
    const float* weight = element<float>(f.weight_ih, f.input_row(n) * f.weight_ih_n + first);
    for (int64_t j = 0; j < width; j++) out[j] = __builtin_fmaf(dz[n], weight[j], out[j]);
  }
}

// Units: panels, each with the row tiles.
void input_backward_split(const RecurrentBackward& f, Span lines, const void* dz, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 32];
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, tiles = tiles_of(count, kRows);
  const int64_t depth = depth_of(f.gate_rows()), column = depth * kSplitTile;
  by_groups(units, tiles, depth, [&](int64_t p, int64_t tile) {
    const Span rows = rows_of(count, tile);
    const B16 *left = element<B16>(f.left, rows.begin * depth * kParts * kDepth),
              *right = element<B16>(f.packed_ih, p * 2 * column);
    split_product(depth, left_rows(left, depth), right, right + column, product);
    for (int64_t r = rows.begin; r < rows.end; r++) {
      float* row = product + (r - rows.begin) * 32;
      if (broken(Vec<float>::load(row)) || broken(Vec<float>::load(row + 16)))
        input_gradient_plainly(f, element<float>(dz, r * f.ld_gates), p * 32, row);
      store_input_gradient<float>(f, lines, r, p * 32, 32, row);
    }
  });
}

// A block of weight gradients without splitting: columns of dz against columns of x or the states.
__attribute__((noinline)) void weight_gradient_plainly(const RecurrentBackward& f, const float* const* rows,
                                                       int64_t count, const float* dz, Span columns, int64_t first,
                                                       int64_t width, float* out) {
  for (int64_t n = columns.begin; n < columns.end; n++, out += 32) {
    for (int64_t j = 0; j < 32; j++) out[j] = 0;
    for (int64_t r = 0; r < count; r++)
      for (int64_t j = 0; j < smaller(32, width - first); j++)
        out[j] = __builtin_fmaf(dz[r * f.ld_gates + n], rows[r] ? rows[r][first + j] : 0.0f, out[j]);
  }
}

// Units: blocks of columns of dz, each with all panels.
void weight_backward_split(const RecurrentBackward& f, Span lines, const void* dz, void* scratch, Span units) {
  const Tiles shape;
  alignas(64) float product[kRows * 32];
  const int64_t input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t panels = input_panels + (f.sum_hh ? tiles_of(f.H, 32) : 0);
  const int64_t count = (lines.end - lines.begin) * f.rows.rows, depth = depth_of(count), column = depth * kSplitTile;
  const bool fresh = f.first_chunk(lines);
  by_groups(units, panels, depth, [&](int64_t columns, int64_t panel) {
    const GradientBlock block = gradient_block(f, columns * panels + panel, panels, input_panels);
    if (!block.used) return;
    const B16 *left = element<B16>(f.transposed, block.columns.begin / kBlock * column),
              *right = element<B16>(f.operand, panel * 2 * column);
    split_product(depth, left_tiles(left, depth), right, right + column, product);
    bool any = false;
    for (int64_t i = 0; i < (block.columns.end - block.columns.begin) * 32; i += kBlock)
      any = any || broken(Vec<float>::load(product + i));
    if (any) {
      const float **input = static_cast<const float**>(scratch), **state = input + f.chunk;
      operand_rows<float>(f, lines, input, state);
      weight_gradient_plainly(f, block.hidden ? state : input, count, static_cast<const float*>(dz), block.columns,
                              block.first, block.width, product);
    }
    add_weight_gradient<float>(f, block.hidden, fresh, block.columns, block.first, 32, product);
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
