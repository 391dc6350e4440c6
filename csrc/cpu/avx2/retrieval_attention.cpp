#include "cpu/avx2/attention_vec.h"

#include "cpu/generic/retrieval_attention.inl.h"
