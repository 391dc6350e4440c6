#include "cpu/avx2/vec.h"

#include "cpu/generic/memory_write.inl.h"
