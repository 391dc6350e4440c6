#include "cpu/generic/location_head.inl.h"

namespace mk::cpu::MK_LEVEL {

const LocationAddressKernels location_address = {
    MK_FLOAT_TYPES(location_address_forward),
    MK_FLOAT_TYPES(location_address_backward),
};

}  // namespace mk::cpu::MK_LEVEL
