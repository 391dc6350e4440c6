#include "cpu/baseline/vec.h"

#include "cpu/generic/allocation.inl.h"
