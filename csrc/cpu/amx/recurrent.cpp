// The recurrent family on AMX tiles: bfloat16, and the products over whole chunks of float32; the rest as at avx512.
//
// A row of a product does not see the other rows of its tile, so results do not depend on B. Precision: float32 sums,
// activations and carries; h and dz are rounded to bfloat16 before they are multiplied.
#include "cpu/amx/recurrent_backward.h"
#include "cpu/amx/recurrent_forward.h"
#include "cpu/amx/recurrent_split.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr RecurrentFormat kFormat = {kBlock, 2,       4, kDepth, 512, {kRows, kRows, kRows}, kRows, kRows, kBlock,
                                     false,  1 << 20, 0, 0,      0};

constexpr RecurrentFormat split_format() {
  RecurrentFormat f = format_of<float>(256, true);
  f.k_multiple = kDepth, f.row_multiple = kRows, f.gate_tile = kRows;
  f.product_bytes = kParts * sizeof(B16), f.product_tile = kRows, f.product_vectors = 2;
  return f;
}

}  // namespace

#define MK_WITH_TILES(function, tiles) \
  { function<double>, function<float>, tiles, function<float16> }
#define MK_WITH_SPLIT(function, split, tiles) \
  { function<double>, split, tiles, function<float16> }
#define MK_CELL_TILES(function, C) \
  { function<C, double>, function<C, float>, function##_tiles<C>, function<C, float16> }
#define MK_CELL_SPLIT(function, C) \
  { function<C, double>, function##_split<C>, function##_tiles<C>, function<C, float16> }
#define MK_CELL(C)                                                                                      \
  {                                                                                                     \
    MK_CELL_SPLIT(pack, C), MK_CELL_TILES(start, C), MK_CELL_SPLIT(project, C), MK_CELL_TILES(step, C), \
        MK_CELL_SPLIT(recall, C), MK_CELL_TILES(gates_backward, C)                                      \
  }
const RecurrentKernels recurrent = {
    {format_of<double>(128, false), split_format(), kFormat, format_of<float16>(256, true)},
    {MK_CELL(LstmCell), MK_CELL(GruCell), MK_CELL(RnnCell)},
    MK_WITH_SPLIT(gather, gather_split, gather_tiles),
    MK_WITH_TILES(gather_known, gather_known_tiles),
    MK_WITH_SPLIT(pack_backward, pack_backward_split, pack_backward_tiles),
    MK_WITH_TILES(start_backward, start_backward_tiles),
    MK_WITH_TILES(state_backward, state_backward_tiles),
    {nullptr, arrange_split, arrange_tiles, nullptr},
    MK_WITH_SPLIT(input_backward, input_backward_split, input_backward_tiles),
    MK_WITH_TILES(bias_backward, bias_backward_tiles),
    MK_WITH_SPLIT(weight_backward, weight_backward_split, weight_backward_tiles),
    MK_FLOAT_TYPES(finish_backward),
};
#undef MK_CELL
#undef MK_CELL_TILES
#undef MK_CELL_SPLIT
#undef MK_WITH_SPLIT
#undef MK_WITH_TILES

}  // namespace mk::cpu::MK_LEVEL
