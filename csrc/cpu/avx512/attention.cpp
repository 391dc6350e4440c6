#include "cpu/avx512/attention_transpose.h"

#include "cpu/generic/attention.inl.h"
