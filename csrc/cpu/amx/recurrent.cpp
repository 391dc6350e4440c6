// The recurrent family in bfloat16 on AMX tiles; the other types as at avx512.
//
// A row of a product does not see the other rows of its tile, so results do not depend on B. Precision: float32 sums,
// activations and carries; h and dz are rounded to bfloat16 before they are multiplied.
#include "cpu/amx/recurrent_backward.h"
#include "cpu/amx/recurrent_forward.h"

namespace mk::cpu::MK_LEVEL {
namespace {

constexpr RecurrentFormat kFormat = {kBlock, 2,     4,      kDepth, 512,    {kRows, kRows, kRows},
                                     kRows,  kRows, kBlock, false,  1 << 20};

}  // namespace

#define MK_WITH_TILES(function, tiles) \
  { function<double>, function<float>, tiles, function<float16> }
#define MK_CELL_TILES(function, C) \
  { function<C, double>, function<C, float>, function##_tiles<C>, function<C, float16> }
#define MK_CELL(C)                                                                                      \
  {                                                                                                     \
    MK_CELL_TILES(pack, C), MK_CELL_TILES(start, C), MK_CELL_TILES(project, C), MK_CELL_TILES(step, C), \
        MK_CELL_TILES(recall, C), MK_CELL_TILES(gates_backward, C)                                      \
  }
const RecurrentKernels recurrent = {
    {format_of<double>(128, false), format_of<float>(256, false), kFormat, format_of<float16>(256, true)},
    {MK_CELL(LstmCell), MK_CELL(GruCell), MK_CELL(RnnCell)},
    MK_WITH_TILES(gather, gather_tiles),
    MK_WITH_TILES(gather_known, gather_known_tiles),
    MK_WITH_TILES(pack_backward, pack_backward_tiles),
    MK_WITH_TILES(start_backward, start_backward_tiles),
    MK_WITH_TILES(state_backward, state_backward_tiles),
    {nullptr, nullptr, arrange_tiles, nullptr},
    MK_WITH_TILES(input_backward, input_backward_tiles),
    MK_WITH_TILES(bias_backward, bias_backward_tiles),
    MK_WITH_TILES(weight_backward, weight_backward_tiles),
    MK_FLOAT_TYPES(finish_backward),
};
#undef MK_CELL
#undef MK_CELL_TILES
#undef MK_WITH_TILES

}  // namespace mk::cpu::MK_LEVEL
