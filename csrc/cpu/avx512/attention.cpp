#include "cpu/avx512/vec.h"

#include "cpu/generic/attention.inl.h"
