#include "cpu/avx2/vec.h"

#include "cpu/generic/ntm_sequence.inl.h"
