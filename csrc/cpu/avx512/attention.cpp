#include "cpu/avx512/attention_vec.h"

#include "cpu/generic/attention.inl.h"
