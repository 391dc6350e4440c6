#include "cpu/avx2/vec.h"

#include "cpu/generic/quantized_attention.inl.h"
