#include "cpu/avx512/vec.h"

#include "cpu/generic/link.inl.h"
