// The table of a level without matrix units.
#include "cpu/generic/lstm.inl.h"

namespace mk::cpu::MK_LEVEL {

const LstmKernels lstm = {
    {format_of<double>(128, false), format_of<float>(256, false), format_of<bfloat16>(256, true),
     format_of<float16>(256, true)},
    MK_FLOAT_TYPES(lstm_pack),
    MK_FLOAT_TYPES(start),
    MK_FLOAT_TYPES(lstm_gather),
    MK_FLOAT_TYPES(lstm_project),
    MK_FLOAT_TYPES(lstm_step),
    MK_FLOAT_TYPES(pack_backward),
    MK_FLOAT_TYPES(start_backward),
    MK_FLOAT_TYPES(gates_backward),
    MK_FLOAT_TYPES(state_backward),
    {nullptr, nullptr, nullptr, nullptr},
    MK_FLOAT_TYPES(input_backward),
    MK_FLOAT_TYPES(bias_backward),
    MK_FLOAT_TYPES(weight_backward),
    MK_FLOAT_TYPES(finish_backward),
};

}  // namespace mk::cpu::MK_LEVEL
