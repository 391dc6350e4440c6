#include "cpu/avx512/vec.h"

#include "cpu/generic/quantized_attention.inl.h"
