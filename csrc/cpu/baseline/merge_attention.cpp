#include "cpu/baseline/vec.h"

#include "cpu/generic/merge_attention.inl.h"
