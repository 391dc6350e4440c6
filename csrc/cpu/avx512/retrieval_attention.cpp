#include "cpu/avx512/attention_vec.h"

#include "cpu/generic/retrieval_attention.inl.h"
