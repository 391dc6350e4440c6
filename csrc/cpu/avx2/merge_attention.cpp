#include "cpu/avx2/vec.h"

#include "cpu/generic/merge_attention.inl.h"
