#include "cpu/avx512/vec.h"

#include "cpu/generic/segment_attention.inl.h"
