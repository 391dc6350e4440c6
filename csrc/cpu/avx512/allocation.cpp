#include "cpu/avx512/vec.h"

#include "cpu/generic/allocation.inl.h"
