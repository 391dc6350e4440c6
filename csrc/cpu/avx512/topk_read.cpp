#include "cpu/avx512/attention_vec.h"

#include "cpu/generic/topk_read.inl.h"
