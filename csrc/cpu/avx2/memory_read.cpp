#include "cpu/avx2/vec.h"

#include "cpu/generic/memory_read.inl.h"
