#include "cpu/baseline/vec.h"

#include "cpu/generic/quantized_attention.inl.h"
