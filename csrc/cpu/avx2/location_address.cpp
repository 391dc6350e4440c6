#include "cpu/avx2/vec.h"

#include "cpu/generic/location_address.inl.h"
