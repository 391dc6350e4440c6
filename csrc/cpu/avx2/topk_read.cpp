#include "cpu/avx2/attention_vec.h"

#include "cpu/generic/topk_read.inl.h"
