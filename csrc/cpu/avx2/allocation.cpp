#include "cpu/avx2/vec.h"

#include "cpu/generic/allocation.inl.h"
