#include "cpu/generic/usage_rows.inl.h"

namespace mk::cpu::MK_LEVEL {

const UsageKernels usage = {MK_FLOAT_TYPES(usage_forward), MK_FLOAT_TYPES(usage_backward)};

}  // namespace mk::cpu::MK_LEVEL
