#include "cpu/avx2/attention_vec.h"

#include "cpu/generic/paged_attention.inl.h"
