#include "cpu/baseline/vec.h"

#include "cpu/generic/paged_attention.inl.h"
