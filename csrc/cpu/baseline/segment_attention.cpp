#include "cpu/baseline/vec.h"

#include "cpu/generic/segment_attention.inl.h"
