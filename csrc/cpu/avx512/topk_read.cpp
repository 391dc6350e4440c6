#include "cpu/avx512/compress.h"

#include "cpu/generic/topk_read.inl.h"
