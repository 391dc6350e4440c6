#include "cpu/baseline/vec.h"

#include "cpu/generic/memory_write.inl.h"
