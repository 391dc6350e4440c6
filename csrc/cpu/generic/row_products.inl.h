// Products and sums over whole rows, for recurrences whose steps have phases (csrc/cpu/lstm_options.h): register tiles
// of gemm_tile.inl.h under a plain row-major interface. No result depends on how units are dealt out.
#pragma once
#include "cpu/generic/gemm_tile.inl.h"
#include "cpu/generic/gates.inl.h"
#include "cpu/generic/recurrent_state.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

// The panel of two vectors of columns of segment s that starts at `first`: out[k][lane], zero past the width.
template <class T>
void pack_panel(const Product& w, int64_t s, int64_t first, acc_t<T>* out) {
  constexpr int64_t kPanel = 2 * Vec<acc_t<T>>::kLanes;
  const int64_t columns = smaller(kPanel, w.width - first);
  for (int64_t p = 0; p < w.parts; p++, out += w.depth * kPanel) {
    const T* from = element<T>(w.weight, s * w.segment_stride + p * w.part_stride + first * w.column_stride);
    if (columns < kPanel)
      for (int64_t i = 0; i < w.depth * kPanel; i++) out[i] = 0;
    if (w.column_stride == 1) {
      for (int64_t k = 0; k < w.depth; k++)
        for (int64_t l = 0; l < columns; l++) out[k * kPanel + l] = to_float(from[k * w.depth_stride + l]);
      continue;
    }
    constexpr int64_t kRun = 64;  // of k: the lines that a run writes stay in the first cache for all columns
    for (int64_t begin = 0; begin < w.depth; begin += kRun)
      for (int64_t l = 0; l < columns; l++)
        for (int64_t k = begin; k < smaller(begin + kRun, w.depth); k++)
          out[k * kPanel + l] = to_float(from[l * w.column_stride + k * w.depth_stride]);
  }
}

template <class T>
void pack_product(const Product& w, Span panels) {
  constexpr int64_t kPanel = 2 * Vec<acc_t<T>>::kLanes;
  const int64_t per_segment = tiles_of(w.width, kPanel);
  for (int64_t u = panels.begin; u < panels.end; u++)
    pack_panel<T>(w, u / per_segment, u % per_segment * kPanel,
                  element<acc_t<T>>(w.packed, u * w.parts * w.depth * kPanel));
}

template <class T>
void row_product(const Product& w, const void* a, int64_t lda, int64_t rows, void* c, int64_t ldc, Span units) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kPanel = 2 * V::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel], with_part[tile_rows(2) * kPanel];
  const int64_t per_segment = tiles_of(w.width, kPanel), tiles = tiles_of(rows, tile_rows(2));
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t panel = u / tiles, s = panel / per_segment, first = panel % per_segment * kPanel;
    const Span tile = tile_of(rows, tiles, u % tiles);
    const int64_t count = tile.end - tile.begin, left = smaller(kPanel, w.width - first);
    const A* from = element<A>(a, tile.begin * lda + s % w.period * w.segment_step);
    const A* packed = element<A>(w.packed, panel * w.parts * w.depth * kPanel);
    A* to = element<A>(c, tile.begin * ldc + s * w.width + first);
    A* sum = left == kPanel ? to : product;
    const int64_t ld = left == kPanel ? ldc : kPanel;
    for (int64_t p = 0; p < w.parts; p++) {
      gemm_tile_for<A, 2, false>(count)(w.depth, from + p * w.part_step, lda, packed + p * w.depth * kPanel,
                                        p ? sum : nullptr, ld, p ? with_part : sum, p ? kPanel : ld);
      for (int64_t r = 0; p && r < count; r++)
        for (int64_t j = 0; j < kPanel; j += V::kLanes) V::load(with_part + r * kPanel + j).store(sum + r * ld + j);
    }
    if (sum == to) continue;
    for (int64_t r = 0; r < count; r++)
      for_each_vec<V>(
          left, [&](int64_t j, auto part) { store(load<V>(product + r * kPanel + j, part), to + r * ldc + j, part); });
  }
}

// Units: panels of each head's columns, each with the row tiles of all its gates. `panel`: room of this rank.
template <class T>
void weight_sum(const WeightSum& w, int64_t rows, bool fresh, void* panel, Span units) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kPanel = 2 * V::kLanes;
  alignas(64) A product[tile_rows(2) * kPanel];
  const int64_t tiles = tiles_of(w.rows, tile_rows(2)), panels = tiles_of(w.width, kPanel);
  A* packed = static_cast<A*>(panel);
  int64_t at = -1;
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t group = u / (tiles * w.gates), head = group / panels, first = group % panels * kPanel;
    const int64_t gate = u / tiles % w.gates, left = smaller(kPanel, w.width - first);
    for (int64_t r = 0; at != group && r < rows; r++) {
      const A* from = element<A>(w.right, r * w.ld_right + head * w.width + first);
      for (int64_t j = 0; j < kPanel; j += V::kLanes) {
        const int64_t n = left - j < 0 ? 0 : smaller(left - j, V::kLanes);
        V::load(from + smaller(j, left), n).store(packed + r * kPanel + j);
      }
    }
    at = group;
    const Span tile = tile_of(w.rows, tiles, u % tiles);
    const int64_t row = (gate * w.heads + head) * w.rows + tile.begin;
    gemm_tile_for<A, 2, true>(tile.end - tile.begin)(rows, element<A>(w.left, row), w.ld_left, packed, nullptr, 0,
                                                     product, kPanel);
    for (int64_t n = 0; n < tile.end - tile.begin; n++) {
      A* total = element<A>(w.sum, (row + n) * w.width + first);
      for_each_vec<V>(left, [&](int64_t j, auto part) {
        const V sum = V::load(product + n * kPanel + j);
        store(fresh ? sum : load<V>(total + j, part) + sum, total + j, part);
      });
    }
  }
}

template <class T>
void column_sum(const ColumnSum& s, int64_t rows, bool fresh, Span columns) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t kBlock = 16;  // short chains of additions: plain torch sums pairwise
  for_each_vec<V>(columns.end - columns.begin, [&](int64_t i, auto part) {
    const int64_t j = columns.begin + i;
    V sum = V::zero();
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      V block = V::zero();
      for (int64_t r = begin; r < smaller(begin + kBlock, rows); r++) {
        const V a = load<V>(element<A>(s.a, r * s.lda + j), part);
        block = s.b ? fma(a, load<V>(element<A>(s.b, r * s.ldb + j), part), block) : block + a;
      }
      sum = sum + block;
    }
    A* total = element<A>(s.total, j);
    store(fresh ? sum : load<V>(total, part) + sum, total, part);
  });
}

// Sums of the accumulation type into a gradient.
template <class T>
void round_sums(const void* from, void* to, int64_t begin, int64_t end) {
  using V = Vec<acc_t<T>>;
  for_each_vec<V>(end - begin, [&](int64_t j, auto part) {
    store(load<V>(element<acc_t<T>>(from, begin + j), part), element<T>(to, begin + j), part);
  });
}

}  // namespace
}  // namespace mk::cpu::MK_LEVEL
