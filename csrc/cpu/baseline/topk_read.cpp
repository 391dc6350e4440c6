#include "cpu/baseline/vec.h"

#include "cpu/generic/topk_read.inl.h"
