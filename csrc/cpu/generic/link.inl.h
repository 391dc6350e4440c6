#include "cpu/generic/link_rows.inl.h"

namespace mk::cpu::MK_LEVEL {

const LinkKernels link = {
    MK_FLOAT_TYPES(link_forward),
    MK_FLOAT_TYPES(link_combine_forward),
    MK_FLOAT_TYPES(link_backward),
    MK_FLOAT_TYPES(link_combine_backward),
};

}  // namespace mk::cpu::MK_LEVEL
