#include "cpu/avx512/vec.h"

#include "cpu/generic/memory_write.inl.h"
