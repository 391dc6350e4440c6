#include "cpu/avx2/attention_transpose.h"

#include "cpu/generic/attention.inl.h"
