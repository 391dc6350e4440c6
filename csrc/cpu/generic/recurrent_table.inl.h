// The table of a level without matrix units.
#include "cpu/generic/recurrent.inl.h"

namespace mk::cpu::MK_LEVEL {

#define MK_CELL_TYPES(function, C) \
  { function<C, double>, function<C, float>, function<C, bfloat16>, function<C, float16> }
#define MK_CELL(C)                                                                                      \
  {                                                                                                     \
    MK_CELL_TYPES(pack, C), MK_CELL_TYPES(start, C), MK_CELL_TYPES(project, C), MK_CELL_TYPES(step, C), \
        MK_CELL_TYPES(recall, C), MK_CELL_TYPES(gates_backward, C)                                      \
  }
const RecurrentKernels recurrent = {
    {format_of<double>(128, false), format_of<float>(256, false), format_of<bfloat16>(256, true),
     format_of<float16>(256, true)},
    {MK_CELL(LstmCell), MK_CELL(GruCell), MK_CELL(RnnCell)},
    MK_FLOAT_TYPES(gather),
    MK_FLOAT_TYPES(gather_known),
    MK_FLOAT_TYPES(pack_backward),
    MK_FLOAT_TYPES(start_backward),
    MK_FLOAT_TYPES(state_backward),
    {nullptr, nullptr, nullptr, nullptr},
    MK_FLOAT_TYPES(input_backward),
    MK_FLOAT_TYPES(bias_backward),
    MK_FLOAT_TYPES(weight_backward),
    MK_FLOAT_TYPES(finish_backward),
};
#undef MK_CELL
#undef MK_CELL_TYPES

}  // namespace mk::cpu::MK_LEVEL
