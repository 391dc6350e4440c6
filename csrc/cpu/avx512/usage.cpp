#include "cpu/avx512/vec.h"

#include "cpu/generic/usage.inl.h"
