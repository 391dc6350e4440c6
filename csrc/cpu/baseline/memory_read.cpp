#include "cpu/baseline/vec.h"

#include "cpu/generic/memory_read.inl.h"
