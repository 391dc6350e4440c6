#include "cpu/avx512/attention_vec.h"

#include "cpu/generic/paged_attention.inl.h"
