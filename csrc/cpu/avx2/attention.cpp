#include "cpu/avx2/attention_vec.h"

#include "cpu/generic/attention.inl.h"
