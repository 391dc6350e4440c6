#include "cpu/baseline/vec.h"

#include "cpu/generic/location_address.inl.h"
