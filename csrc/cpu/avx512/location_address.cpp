#include "cpu/avx512/vec.h"

#include "cpu/generic/location_address.inl.h"
