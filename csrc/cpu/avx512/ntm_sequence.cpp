#include "cpu/avx512/vec.h"

#include "cpu/generic/ntm_sequence.inl.h"
