#include "cpu/generic/allocation_rows.inl.h"

namespace mk::cpu::MK_LEVEL {

const AllocationKernels allocation = {MK_FLOAT_TYPES(allocation_forward), MK_FLOAT_TYPES(allocation_backward)};

}  // namespace mk::cpu::MK_LEVEL
