#include "cpu/avx2/vec.h"

#include "cpu/generic/segment_attention.inl.h"
