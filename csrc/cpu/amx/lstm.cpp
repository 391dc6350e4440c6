// lstm in bfloat16 on AMX tiles; the other types as at avx512.
//
// Operands are tiles of 16 rows x 32 k (left) and 16 pairs of k x 16 columns (right), 1 KB each, packed one after the
// other; sums are float32 tiles. z of a panel (16 units, 4 gates) is 4 sum tiles a block of 16 rows: side by side for
// one block, in two passes of 2 x 2 for two. A row of a product does not see the other rows of its tile, so results do
// not depend on B. Precision: float32 sums, activations and carries; h and dz are rounded to bfloat16 before they are
// multiplied.
#include "cpu/amx/vec.h"

#include "cpu/avx512/transpose.h"
#include "cpu/generic/lstm.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr int64_t kBlock = 16, kDepth = 32, kRows = 32, kTile = kBlock * kDepth;  // kTile: elements of an operand tile
using B16 = bfloat16;

MK_INLINE Span rows_of(int64_t rows, int64_t i) { return {i * kRows, smaller(i * kRows + kRows, rows)}; }
MK_INLINE int64_t depth_of(int64_t k) { return (k + kDepth - 1) / kDepth; }

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

// Two rows of right operand, 16 columns: the pairs of a tile row.
MK_INLINE __m512i pair_rows(const B16* even, const B16* odd, int64_t left) {
  const __mmask16 mask = Vec<float>::first(left);
  const __m256i low = even ? _mm256_maskz_loadu_epi16(mask, even) : _mm256_setzero_si256();
  const __m256i high = odd ? _mm256_maskz_loadu_epi16(mask, odd) : _mm256_setzero_si256();
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// A panel of 32 columns from rows of k: [k block][half][pair of k][column][2]; row(k) is a row's first element or null
// for zeros.
template <class Row>
MK_INLINE void pack_column_tiles(const Row& row, int64_t count, int64_t first, int64_t width, B16* out) {
  for (int64_t pair = 0; pair < depth_of(count) * kBlock; pair++) {
    const B16 *even = 2 * pair < count ? row(2 * pair) : nullptr,
              *odd = 2 * pair + 1 < count ? row(2 * pair + 1) : nullptr;
    for (int64_t half = 0; half < 2; half++) {
      const int64_t j = first + half * kBlock, left = width - j < 0 ? 0 : smaller(width - j, kBlock),
                    at = smaller(j, width);
      B16* to = out + (pair / kBlock * 2 + half) * kTile + pair % kBlock * kDepth;
      _mm512_storeu_si512(to, pair_rows(even ? even + at : nullptr, odd ? odd + at : nullptr, left));
    }
  }
}

MK_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums of 16 rows x 4 tiles over `depth` blocks; the right tiles of a block are b, b + kTile and the same two `pair`
// elements on.
MK_INLINE void row_product(int64_t depth, const B16* a, int64_t lda, const B16* b, int64_t block, int64_t pair,
                           const float* init, int64_t ldi, float* c, int64_t ldc) {
  if (init) {
    _tile_loadd(0, init, ldi * 4);
    _tile_loadd(1, init + 16, ldi * 4);
    _tile_loadd(2, init + 32, ldi * 4);
    _tile_loadd(3, init + 48, ldi * 4);
  } else {
    zero_sums();
  }
  for (int64_t k = 0; k < depth; k++, a += kDepth, b += block) {
    _tile_loadd(4, a, lda * 2);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + pair, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + pair + kTile, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 32, ldc * 4);
  _tile_stored(3, c + 48, ldc * 4);
}

// Sums of 32 rows x 2 tiles. The left operand is either rows (`lda`) or, with lda = kDepth, packed tiles; `below`: to
// rows 16..31.
MK_INLINE void square_product(int64_t depth, const B16* a, int64_t lda, int64_t a_step, int64_t below, const B16* b,
                              int64_t block, const float* init, int64_t ldi, float* c, int64_t ldc) {
  if (init) {
    _tile_loadd(0, init, ldi * 4);
    _tile_loadd(1, init + 16, ldi * 4);
    _tile_loadd(2, init + 16 * ldi, ldi * 4);
    _tile_loadd(3, init + 16 * ldi + 16, ldi * 4);
  } else {
    zero_sums();
  }
  for (int64_t k = 0; k < depth; k++, a += a_step, b += block) {
    _tile_loadd(4, a, lda * 2);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + below, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

// z of up to 32 rows of a panel: [row][gate][unit] float.
MK_INLINE void gate_product(int64_t rows, int64_t depth, const B16* a, int64_t lda, const B16* panel, const float* init,
                            int64_t ldi, float* c) {
  constexpr int64_t kPanel = 4 * kBlock;
  if (rows <= kBlock) return row_product(depth, a, lda, panel, 4 * kTile, 2 * kTile, init, ldi, c, kPanel);
  for (int64_t half = 0; half < 2; half++)
    square_product(depth, a, lda, kDepth, kBlock * lda, panel + half * 2 * kTile, 4 * kTile, init + half * 32, ldi,
                   c + half * 32, kPanel);
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
  const int64_t rows = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(rows, kRows);
  const B16* x = f.x ? element<B16>(f.x, 0) : element<B16>(f.input, steps.begin * f.input_t);
  alignas(64) float bias[kRows * 64];
  int64_t filled = -1;
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span r = rows_of(rows, u % tiles);
    for (int64_t i = 0; i < kRows && filled != p; i++)
      for (int64_t j = 0; j < 64; j += 16)
        Vec<float>::load(element<float>(f.bias, p * 64 + j)).store(bias + i * 64 + j);
    filled = p;
    gate_product(r.end - r.begin, depth_of(f.I), x + r.begin * f.ld_x, f.ld_x,
                 element<B16>(f.packed_ih, p * f.k_input * 64), bias, 64,
                 element<float>(f.projected, (p * f.chunk + r.begin) * 64));
  }
}

void step_tiles(const LstmForward& f, int64_t t, int64_t row, int64_t parity, Span units) {
  const Tiles shape;
  alignas(64) float z[kRows * 64];
  const int64_t tiles = tiles_of(f.rows.B, kRows);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span b = rows_of(f.rows.B, u % tiles);
    gate_product(b.end - b.begin, depth_of(f.H), element<B16>(f.hidden[parity], b.begin * f.ld_hidden), f.ld_hidden,
                 element<B16>(f.packed_hh, p * f.k_hidden * 64),
                 element<float>(f.projected, (p * f.chunk + row + b.begin) * 64), 64, z);
    cell_rows<B16, B16>(f, z, t, b, p, parity);
  }
}

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
  for (int64_t u = units.begin; u < units.end;) {
    const int64_t p = u / tiles;
    const Span b = rows_of(f.rows.B, u % tiles);
    const B16 *a = element<B16>(dz, b.begin * f.ld_gates), *weight = element<B16>(f.packed_hh, p * panel);
    // One block of rows takes two panels at once, for four independent chains of sums; the next panel may be another
    // rank's.
    const int64_t width = b.end - b.begin <= kBlock && tiles == 1 && u + 1 < units.end ? 64 : 32;
    if (width == 64) {
      row_product(depth, a, f.ld_gates, weight, 2 * kTile, panel, nullptr, 0, product, 64);
    } else {
      const int64_t below = b.end - b.begin > kBlock ? kBlock * f.ld_gates : 0;
      square_product(depth, a, f.ld_gates, kDepth, below, weight, 2 * kTile, nullptr, 0, product, 64);
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

void input_backward_tiles(const LstmBackward& f, Span steps, const void* dz, Span units) {
  const Tiles shape;
  using V = Vec<float>;
  alignas(64) float product[kRows * 32];
  const int64_t count = (steps.end - steps.begin) * f.rows.B, tiles = tiles_of(count, kRows);
  for (int64_t u = units.begin; u < units.end; u++) {
    const int64_t p = u / tiles;
    const Span rows = rows_of(count, u % tiles);
    square_product(depth_of(4 * f.H), element<B16>(dz, rows.begin * f.ld_gates), f.ld_gates, kDepth,
                   rows.end - rows.begin > kBlock ? kBlock * f.ld_gates : 0,
                   element<B16>(f.packed_ih, p * f.k_gates * 32), 2 * kTile, nullptr, 0, product, 32);
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

void weight_backward_tiles(const LstmBackward& f, Span steps, const void*, void* scratch, Span units) {
  const Tiles shape;
  using V = Vec<float>;
  alignas(64) float product[kRows * 32];
  const int64_t tiles = tiles_of(4 * f.H, kRows), input_panels = f.sum_ih ? tiles_of(f.I, 32) : 0;
  const int64_t count = (steps.end - steps.begin) * f.rows.B, depth = depth_of(count);
  const bool fresh = f.first_chunk(steps);
  const B16 **input = static_cast<const B16**>(scratch), **state = input + f.chunk;
  B16* panel = reinterpret_cast<B16*>(state + f.chunk);
  if (units.begin < units.end) operand_rows<B16>(f, steps, input, state);
  int64_t packed = -1;
  for (int64_t u = units.begin; u < units.end; u++) {
    const bool hidden = u / tiles >= input_panels;
    const int64_t first = (u / tiles - (hidden ? input_panels : 0)) * 32, width = hidden ? f.H : f.I;
    if (packed != u / tiles) {
      const B16* const* rows = hidden ? state : input;
      pack_column_tiles([&](int64_t row) { return rows[row]; }, count, first, width, panel);
    }
    packed = u / tiles;
    const Span rows = rows_of(4 * f.H, u % tiles);
    float* total = element<float>(hidden ? f.sum_hh : f.sum_ih, rows.begin * width + first);
    const bool whole = rows.end - rows.begin == kRows && first + 32 <= width;
    // Whole blocks add to the sums in the tile registers.
    square_product(depth, element<B16>(f.transposed, rows.begin / kBlock * depth * kTile), kDepth, kTile,
                   rows.end - rows.begin > kBlock ? depth * kTile : 0, panel, 2 * kTile,
                   whole && !fresh ? total : nullptr, width, whole ? total : product, whole ? width : 32);
    if (whole) continue;
    for (int64_t n = 0; n < rows.end - rows.begin; n++)
      for_each_vec<V>(smaller(32, width - first), [&](int64_t j, auto part) {
        const V sum = V::load(product + n * 32 + j);
        store(fresh ? sum : load<V>(total + n * width + j, part) + sum, total + n * width + j, part);
      });
  }
}

constexpr LstmFormat kFormat = {kBlock, 2, 4, kDepth, 512, kRows, kRows, kRows, kBlock, false};

}  // namespace

#define MK_WITH_TILES(function, tiles) \
  { function<double>, function<float>, tiles, function<float16> }
const LstmKernels lstm = {
    {format_of<double>(128, false), format_of<float>(256, false), kFormat, format_of<float16>(256, true)},
    MK_WITH_TILES(lstm_pack, pack_tiles),
    MK_WITH_TILES(start, start_tiles),
    MK_WITH_TILES(lstm_gather, gather_tiles),
    MK_WITH_TILES(lstm_project, project_tiles),
    MK_WITH_TILES(lstm_step, step_tiles),
    MK_WITH_TILES(pack_backward, pack_backward_tiles),
    MK_WITH_TILES(start_backward, start_backward_tiles),
    MK_WITH_TILES(gates_backward, gates_backward_tiles),
    MK_WITH_TILES(state_backward, state_backward_tiles),
    {nullptr, nullptr, transpose_tiles, nullptr},
    MK_WITH_TILES(input_backward, input_backward_tiles),
    MK_WITH_TILES(bias_backward, bias_backward_tiles),
    MK_WITH_TILES(weight_backward, weight_backward_tiles),
    MK_FLOAT_TYPES(finish_backward),
};
#undef MK_WITH_TILES

}  // namespace mk::cpu::MK_LEVEL
