#include "cpu/avx2/vec.h"

#include "cpu/generic/dnc_sequence.inl.h"
