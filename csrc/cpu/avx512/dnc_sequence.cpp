#include "cpu/avx512/vec.h"

#include "cpu/generic/dnc_sequence.inl.h"
