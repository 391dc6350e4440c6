#include "cpu/avx2/vec.h"

#include "cpu/generic/link.inl.h"
