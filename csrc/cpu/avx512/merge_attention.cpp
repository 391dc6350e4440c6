#include "cpu/avx512/vec.h"

#include "cpu/generic/merge_attention.inl.h"
